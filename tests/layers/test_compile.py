"""torch.compile over blocks: their graphs break at operators alone, and collectives and gradients are as without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from packaging import version
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hybrid_sp as hsp
from layers.block import Block, FeedForward
from layers.registry import MIXERS, mixer_spec
from tests.layers.formulas.parts import CONTEXT
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

TWO = ("comba", "delta_net", "gated_delta_net", "gated_delta_product", "kda", "mamba2", "rwkv6")
OPERATORS = dict.fromkeys(TWO, 2)  # that a mixer calls; others one
WIDE = replace(CONTEXT, dim=32)
KEPT_OUT = "Attempted to call function marked as skipped"
# A break within a function that a block calls then leaves the block's own graph whole; torch 2.11 loses names over it.
NESTED = version.parse(torch.__version__) >= version.parse("2.13")


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """Nothing is compiled yet, and nothing stays."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.compiled = self.run = 0

    def __call__(self, module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.run += 1
            return module.forward(*args)

        return run


def whole_graphs() -> AbstractContextManager[Any]:
    return torch._dynamo.config.patch(nested_graph_breaks=True) if NESTED else nullcontext()


def block_of(mixer: str, **options: Any) -> Block:
    torch.manual_seed(0)
    return Block(mixer_spec(mixer, **options), WIDE, FeedForward(32)).double()


def tokens(count: int) -> Tensor:
    return torch.randn(2, count, WIDE.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def results(block: Callable[..., Any], weights: nn.Module, x: Tensor, shard: hsp.Shard | None) -> list[Tensor]:
    """Output, and gradients of the input and of every weight."""
    x = x.detach().requires_grad_()
    y, *_ = block(x, shard)
    grads = torch.autograd.grad(y.square().sum(), [x, *weights.parameters()], allow_unused=True)
    return [y, *(grad for grad in grads if grad is not None)]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Up to rounding: a compiler may sum otherwise."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(f"tensor {i}", a, b, 1e-12)


FEW = ("gated_delta_net", "softmax")


@pytest.mark.parametrize("mixer", tiered(FEW, [mixer for mixer in MIXERS if mixer not in FEW]))
def test_a_block_breaks_once_at_every_operator(mixer: str) -> None:
    block, graphs = block_of(mixer), Graphs()
    sp = hsp.SequenceParallel(None)
    with whole_graphs():
        compiled = torch.compile(block, backend=graphs)
        for _ in range(2):  # another shard of as many tokens compiles nothing anew
            shard = sp.shard(20)
            assert_same(results(compiled, block, tokens(20), shard), results(block, block, tokens(20), shard))
    operators = OPERATORS.get(mixer, 1)
    assert {reason.splitlines()[0] for reason in counters["graph_break"]} == {KEPT_OUT}
    assert len(counters["graph_break"]) <= operators
    if NESTED:
        assert sum(counters["graph_break"].values()) == operators
        assert graphs.compiled == operators + 1 and graphs.run == 2 * (operators + 1)


@pytest.mark.parametrize("mixer", tiered(["gated_delta_net"], ["softmax"]))
def test_breaks_as_torch_is_set_by_default(mixer: str) -> None:
    """A break within a function that a block calls then ends the graphs of both, so there are more; all of its reasons
    are operators."""
    block, graphs = block_of(mixer), Graphs()
    compiled = torch.compile(block, backend=graphs)
    shard = hsp.SequenceParallel(None).shard(20)
    assert_same(results(compiled, block, tokens(20), shard), results(block, block, tokens(20), shard))
    assert {reason.splitlines()[0] for reason in counters["graph_break"]} == {KEPT_OUT}
    assert len(counters["graph_break"]) <= OPERATORS.get(mixer, 1)
    assert graphs.run <= OPERATORS.get(mixer, 1) + 3


@pytest.mark.parametrize("mixer", tiered(["softmax"], ["gated_delta_net"]))
def test_with_graphs_of_the_backward_pass_too(mixer: str) -> None:
    block = block_of(mixer)
    compiled = torch.compile(block, backend="aot_eager")
    assert_same(results(compiled, block, tokens(20), None), results(block, block, tokens(20), None))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler is installed")
def test_with_the_default_backend() -> None:
    block = block_of("gla")
    compiled = torch.compile(block)
    assert_same(results(compiled, block, tokens(20), None), results(block, block, tokens(20), None))


def compare_on_ranks(group: Any) -> None:
    shard = hsp.SequenceParallel(group, layout="zigzag", check="calls").shard(30)
    x = shard.take(tokens(30))
    torch.manual_seed(0)
    weights = nn.Linear(WIDE.dim, WIDE.dim).double()

    def run(x: Tensor, shard: hsp.Shard) -> tuple[Tensor, None]:
        """Both operators and a gather, with work before, between and after the operators."""
        q = weights(x).unflatten(-1, (4, -1))
        o = hsp.linear_attention(q.sigmoid(), q, q, log_decay=-q.square(), shard=shard)
        o = hsp.softmax_attention(o, o.tanh(), q, shard=shard)
        return shard.gather(weights(o.flatten(2))), None

    torch._dynamo.reset()
    graphs = Graphs()
    books = []
    found = []
    for function in (run, torch.compile(run, backend=graphs)):
        with hsp.ledger() as book, whole_graphs():
            found.append(results(function, weights, x, shard))
        books.append([(row.collective, row.tag, row.direction, row.bytes) for row in book.rows])
    assert graphs.run == 3 and books[0] and books[0] == books[1]
    assert_same(found[1], found[0])
    torch._dynamo.reset()


def test_ranks_make_the_same_collectives_in_the_same_order() -> None:
    run_ranks(compare_on_ranks, 2)
