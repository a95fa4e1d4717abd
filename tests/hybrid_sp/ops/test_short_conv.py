"""Short convolution and token shift on P ranks: short spans and documents, what they communicate, and when."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives
from hybrid_sp.comm.pending import Header, Pending
from hybrid_sp.ops import short_conv
from tests.hybrid_sp.cases import Case, truth
from tests.hybrid_sp.ops.test_parity import LAYOUTS, check_cases
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

Leaves = dict[str, Tensor]


def conv(width: int, length: int = 23, states: bool = True, **options: Any) -> Case:
    """A convolution with bias and SiLU; of width 0 the token shift."""
    operator = "conv" if width else "shift"
    return Case(operator=operator, width=width, bias=width > 0, length=length, states=states, **options)


def leaves_of(case: Case, shard: hsp.Shard, dtype: torch.dtype = torch.float64) -> Leaves:
    x = {name: v if case.whole(name) else shard.take(v) for name, v in case.inputs(dtype).items()}
    return {name: value.detach().requires_grad_() for name, value in x.items()}


MANY = (0, 1, 2, 6, 7, 8, 9, 13, 20, 22, 23)  # documents of one token, several in a span, and on the bounds of spans
HALVES = (0, 11, 23)  # a document begins with the second rank of two


def short_cases() -> list[Case]:
    cases = [conv(w, length) for w in (3, 4, 11, 30) for length in (8, 9)]  # spans shorter than W - 1, and sequences
    cases += [conv(w, documents=documents) for w in (0, 1, 2, 4, 30) for documents in (MANY, HALVES)]
    cases += [conv(w, documents=tuple(range(24))) for w in (0, 3)]
    return cases


WAYS = [(1, "contiguous"), (2, "zigzag"), (3, "contiguous"), (4, "zigzag")]
REST = [one for one in itertools.product((1, 2, 3, 4), LAYOUTS) if one not in WAYS]


@pytest.mark.parametrize(("world", "layout"), tiered(WAYS, REST))
def test_parity_of_short_spans_and_documents(world: int, layout: str) -> None:
    cases = [(replace(case, layout=layout), truth(case)) for case in short_cases()]
    assert run_ranks(check_cases, world, cases, 8, 64) == [len(cases)] * world


def test_it_is_torch_conv1d() -> None:
    x = conv(3, 40).inputs()
    got = hsp.short_conv(x["x"], x["weight"], x["bias"])
    padded = F.pad(x["x"].transpose(1, 2), (2, 0))
    want = F.conv1d(padded, x["weight"][:, None], x["bias"], groups=padded.shape[1]).transpose(1, 2)
    assert isinstance(got, Tensor)
    assert_close("y", got, want, 1e-13)


@pytest.mark.parametrize("width", [0, 1, 2, 4])
def test_two_halves_are_the_whole(width: int) -> None:
    case = conv(width)
    x = case.inputs()
    y, [final] = case.call(x, None)
    for cut in (1, 2, 11, 22):
        first, [state] = case.call(x | {"x": x["x"][:, :cut]}, None)
        second, [end] = case.call(x | {"x": x["x"][:, cut:], "initial": state}, None)
        assert_close(f"halves at {cut}", torch.cat([first, second], 1), y, 1e-15)
        assert torch.equal(end, final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_y_and_states_have_the_dtype_of_x_and_a_gradient_that_of_its_input(dtype: torch.dtype) -> None:
    x = torch.randn(1, 6, 3, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float32, requires_grad=True)
    out = hsp.short_conv(x, weight, bias, initial_state=x[:, :2].detach(), return_final_state=True)
    assert [y.dtype for y in out] == [dtype] * 2
    grads = torch.autograd.grad(out[0].sum(), (x, weight, bias))
    assert [grad.dtype for grad in grads] == [dtype, torch.float64, torch.float32]


def rows_read(case: Case, shard: hsp.Shard) -> tuple[int, int]:
    """Tokens that this rank reads of others, and that others read of it, counted one by one."""
    owner = {t: rank for rank in range(shard.sp.size) for a, b in shard.spans_at(rank) for t in range(a, b)}
    kept = case.width - 1 if case.width else 1

    def read(rank: int) -> list[int]:
        ends = [(a, shard.document_start(a)) for a, _ in shard.spans_at(rank)]
        if case.states:
            ends.append((case.length, shard.document_start(case.length - 1)))
        return [t for end, begin in ends for t in range(max(begin, end - kept), end)]

    me = shard.sp.rank
    others = [owner[t] for rank in range(shard.sp.size) if rank != me for t in read(rank)]
    return sum(owner[t] != me for t in read(me)), others.count(me)


def ledger_of(group: Any, case: Case, dtype: torch.dtype) -> list[tuple[str, str, str, int]]:
    """Rows of the ledger, whose bytes must be those of the tokens: in the dtype of x forward, fp32 backward."""
    shard = hsp.SequenceParallel(group, layout=case.layout).shard(case.length, case.documents)
    x = leaves_of(case, shard, dtype)
    with hsp.ledger() as book:
        y, finals = case.call(x, shard)
        sum((out.sum() for out in finals), y.sum()).backward()
    received, returned = rows_read(case, shard)
    row = x["x"].shape[0] * x["x"].shape[2]
    rows = [(r.collective, r.tag, r.direction, r.bytes) for r in book.rows]
    assert [r[3] for r in rows] == ([received * row * dtype.itemsize, returned * row * 4] if rows else [])
    assert rows or received == returned == 0
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_exchange_each_way_of_the_halo_alone(layout: str) -> None:
    kinds = [("all_to_all", "conv", "forward"), ("all_to_all", "conv", "backward")]
    for width, states, dtype in itertools.product((0, 2, 4, 30), (True, False), (torch.float32, torch.bfloat16)):
        case = conv(width, states=states, layout=layout)
        found = [run_ranks(ledger_of, 4, replace(case, length=length), dtype) for length in (40, 400)]
        assert all([row[:3] for row in rows] == kinds for rows in sum(found, []))
        assert width > 10 or found[0] == found[1]  # bytes do not grow with the sequence
    run_ranks(ledger_of, 3, conv(4, documents=MANY, layout=layout), torch.float32)


def test_nothing_is_sent_where_nothing_is_read() -> None:
    for case in (conv(1), conv(4, documents=HALVES, states=False)):
        assert run_ranks(ledger_of, 2, case, torch.float32) == [[], []]
    assert ledger_of(None, conv(4, layout="zigzag"), torch.float32) == []


def logged(group: Any, overlap: bool, width: int) -> list[str]:
    """Launches, waits and local work of one layer, forward and backward."""
    log: list[str] = []
    launch = collectives.start_all_to_all
    work = {name: getattr(short_conv.kernel, name) for name in ("local_forward", "local_backward")}

    def launched(x: Tensor, sent: list[int], received: list[int], group: Any, header: Header) -> Pending:
        log.append(f"launch {header.direction}")
        pending = launch(x, sent, received, group, header)

        def waited() -> Any:
            log.append(f"wait {header.direction}")
            return pending.wait()

        return Pending(waited)

    def noted(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            log.append(name.replace("_", " "))
            return work[name](*args)

        return run

    case = conv(width, 24)
    shard = hsp.SequenceParallel(group, overlap=overlap, layout="zigzag").shard(24)
    try:
        collectives.start_all_to_all = launched
        for name in work:
            setattr(short_conv.kernel, name, noted(name))
        y, [final] = case.call(leaves_of(case, shard), shard)
        (y.sum() + final.sum()).backward()
    finally:
        collectives.start_all_to_all = launch
        for name, function in work.items():
            setattr(short_conv.kernel, name, function)
    return log


@pytest.mark.parametrize("width", [0, 4])
def test_local_work_runs_while_the_halo_is_in_flight(width: int) -> None:
    mirrored = ["launch forward", "local forward", "wait forward", "launch backward", "local backward", "wait backward"]
    assert run_ranks(logged, 2, True, width) == [mirrored] * 2
    waiting = ["launch forward", "wait forward", "local forward", "launch backward", "wait backward", "local backward"]
    assert run_ranks(logged, 2, False, width) == [waiting] * 2


def partial_gradients(group: Any) -> None:
    """Each input alone: as the only one that is asked for, and as the only one that needs a gradient. And the final
    state alone, after a pass that did not get as far as the gradient of x and must leave nothing behind."""
    case = conv(4)
    shard = hsp.SequenceParallel(group, layout="zigzag", check="calls").shard(case.length)
    leaves = leaves_of(case, shard)

    def loss(x: Leaves) -> Tensor:
        y, [final] = case.call(x, shard)
        return y.square().sum() + final.square().sum()

    whole = torch.autograd.grad(loss(leaves), list(leaves.values()))
    for name, want in zip(leaves, whole, strict=True):
        (asked,) = torch.autograd.grad(loss(leaves), leaves[name])
        alone = {n: leaf.detach().requires_grad_(n == name) for n, leaf in leaves.items()}
        (needed,) = torch.autograd.grad(loss(alone), alone[name])
        assert torch.equal(asked, want) and torch.equal(needed, want), f"{name} on rank {shard.sp.rank}"

    y, [final] = case.call(leaves, shard)
    (fresh,) = torch.autograd.grad(final.square().sum(), leaves["x"], retain_graph=True)
    torch.autograd.grad(y.sum(), leaves["weight"], retain_graph=True)
    (after,) = torch.autograd.grad(final.square().sum(), leaves["x"])
    assert torch.equal(after, fresh), "an earlier pass reaches into this one"
    assert fresh.count_nonzero() == (
        3 * fresh.shape[0] * fresh.shape[2] if case.length - 1 in shard_tokens(shard) else 0
    )


def shard_tokens(shard: hsp.Shard) -> set[int]:
    return {t for a, b in shard.spans for t in range(a, b)}


def test_an_input_alone_has_the_gradient_that_it_has_among_all() -> None:
    for world in (1, 2):
        run_ranks(partial_gradients, world)


def leaks(group: Any, layout: str) -> None:
    """Change one token: of all outputs those of its document that read it move, and no other by a bit."""
    length, documents, changed = 37, (0, 12, 13, 30, 37), 15
    shard = hsp.SequenceParallel(group, layout=layout, check="calls").shard(length, documents)
    for case in (conv(width, length, False, documents=documents) for width in (4, 0)):
        inputs = case.inputs()

        def moved(tokens: slice, case: Case = case, inputs: Leaves = inputs) -> list[int]:
            other = inputs | {"x": inputs["x"].clone()}
            other["x"][:, tokens] = float("nan")
            a, b = (shard.gather(case.call(x | {"x": shard.take(x["x"])}, shard)[0]) for x in (inputs, other))
            return [t for t in range(length) if not torch.equal(a[:, t], b[:, t])]

        assert moved(slice(changed, changed + 1)) == ([15, 16, 17, 18] if case.width else [16])
        assert moved(slice(28, 30)) == ([28, 29] if case.width else [29])  # the end of a document


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leak_and_dependence(layout: str) -> None:
    for world in (1, 2, 4):
        run_ranks(leaks, world, layout)


X, WEIGHT = torch.rand(2, 6, 3), torch.rand(3, 4)
PACKED = hsp.SequenceParallel(None).shard(6, (0, 2, 6))


@pytest.mark.parametrize(
    ("message", "args", "options"),
    [
        (r"x must be \[batch, tokens, dim\]", (X[0], WEIGHT), {}),
        ("x must be floating point", (X.int(), WEIGHT), {}),
        (r"weight must be \[3, W\] with W at least 1", (X, WEIGHT[:2]), {}),
        (r"weight must be \[3, W\] with W at least 1", (X, WEIGHT[:, :0]), {}),
        (r"weight must be \[3, W\] with W at least 1", (X, WEIGHT[0]), {}),
        (r"bias must be \[3\], got \(2,\)", (X, WEIGHT, torch.rand(2)), {}),
        ("weight and bias must be floating point", (X, WEIGHT.int()), {}),
        ("activation must be None or 'silu', got 'gelu'", (X, WEIGHT), {"activation": "gelu"}),
        (r"initial_state must be \(2, 3, 3\)", (X, WEIGHT), {"initial_state": torch.rand(2, 4, 3)}),
        ("initial_state must be .* of torch.float32", (X, WEIGHT), {"initial_state": torch.rand(2, 3, 3).double()}),
        ("x has 5 tokens", (X[:, :5], WEIGHT), {"shard": hsp.SequenceParallel(None).shard(6)}),
        ("the batch is 2", (X, WEIGHT), {"shard": PACKED}),
    ],
)
def test_short_conv_refuses(message: str, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"short_conv: .*{message}"):
        hsp.short_conv(*args, **options)


@pytest.mark.parametrize(
    ("message", "x", "options"),
    [
        (r"x must be \[batch, tokens, dim\]", X[0], {}),
        (r"initial_state must be \(2, 1, 3\)", X, {"initial_state": X[:, :2]}),
        ("the batch is 2", X, {"shard": PACKED}),
    ],
)
def test_token_shift_refuses(message: str, x: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"token_shift: .*{message}"):
        hsp.token_shift(x, **options)
