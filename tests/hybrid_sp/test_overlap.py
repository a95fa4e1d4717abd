"""The schedule: what is in flight while what is computed, and that no collective is lost, doubled or mispaired."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hybrid_sp as hsp
from hybrid_sp.comm import collectives, groups
from hybrid_sp.comm.pending import Header, Pending
from hybrid_sp.exchange import EXCHANGES, choose
from hybrid_sp.kernels.reference.delta import DeltaPhases
from hybrid_sp.kernels.reference.linear import LinearPhases
from hybrid_sp.kernels.softmax import tiled
from hybrid_sp.ops import short_conv
from tests.support.ranks import run_ranks

KINDS = ("linear", "delta", "softmax")
ALL = (*KINDS, "window", "conv")  # the order of these two is in ops/test_window.py and ops/test_short_conv.py
# Every operator, and the linear ones by every exchange of states; their order is in test_exchange.py.
EVERY = [(kind, "all_gather") for kind in ALL]
EVERY += [(kind, name) for kind in ("linear", "delta") for name in EXCHANGES if name != "all_gather"]


class Gate:
    """Collectives that local work releases: `log` holds launches, local work and waits, and which were too early."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.released = False

    def launch(self, start: Callable[..., Pending]) -> Callable[..., Pending]:
        def gated(x: Tensor, group: Any, header: Header) -> Pending:
            self.log.append(f"launch {header.direction}")
            self.released = False
            pending = start(x, group, header)

            def held() -> Any:
                self.log.append(f"wait {header.direction}")
                if not self.released:
                    self.log.append("not released")
                return pending.wait()

            return Pending(held)

        return gated

    def work(self, function: Callable[..., Any], name: str, own: Callable[..., bool]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if own(*args):
                self.log.append(name)
                self.released = True
            return result

        return timed

    @contextmanager
    def installed(self) -> Iterator[Gate]:
        places: list[tuple[Any, str, Callable[..., Any]]] = [
            (collectives, "start_all_gather", self.launch(collectives.start_all_gather)),
            (collectives, "start_reduce_scatter", self.launch(collectives.start_reduce_scatter)),
            *(
                (phases, f"intra_{way}", self.work(getattr(phases, f"intra_{way}"), f"local {way}", lambda *_: True))
                for phases in (LinearPhases, DeltaPhases)
                for way in ("forward", "backward")
            ),
            (tiled, "attend", self.work(tiled.attend, "local forward", lambda *args: args[3])),
            (tiled, "attend_backward", self.work(tiled.attend_backward, "local backward", lambda *args: args[6])),
        ]
        before = [getattr(module, name) for module, name, _ in places]
        for module, name, new in places:
            setattr(module, name, new)
        try:
            yield self
        finally:
            for (module, name, _), old in zip(places, before, strict=True):
                setattr(module, name, old)


def leaves(shard: hsp.Shard, heads: int = 2) -> list[Tensor]:
    make = torch.Generator().manual_seed(3)
    whole = [torch.randn(1, shard.length, heads, 4, generator=make, dtype=torch.float64) for _ in range(3)]
    decay = -torch.rand(1, shard.length, heads, generator=make, dtype=torch.float64)
    return [shard.take(x).requires_grad_() for x in (*whole, decay)]


def attend(kind: str, x: list[Tensor], shard: hsp.Shard) -> Tensor:
    if kind in ("softmax", "window"):
        return hsp.softmax_attention(*x[:3], window=3 if kind == "window" else None, shard=shard)
    if kind == "conv":
        mixed = (x[0] + x[1] + x[2] * x[3].unsqueeze(-1)).flatten(2)
        y = hsp.short_conv(mixed, torch.linspace(-1, 1, 32).view(8, 4), shard=shard)
        assert isinstance(y, Tensor)
        return y.unflatten(2, (2, 4))
    if kind == "delta":
        out = hsp.delta_rule(x[0], F.normalize(x[1], dim=-1), x[2], beta=x[3].exp(), log_decay=x[3], shard=shard)
        assert isinstance(out, Tensor)
        return out
    out = hsp.linear_attention(*x[:3], log_decay=x[3], shard=shard)
    assert isinstance(out, Tensor)
    return out


def logged(group: Any, kind: str, overlap: bool) -> list[str]:
    sp = hsp.SequenceParallel(group, overlap=overlap)
    shard = sp.shard(30)
    x = leaves(shard)
    with Gate().installed() as gate:
        attend(kind, x, shard).sum().backward()
    return gate.log


@pytest.mark.parametrize("kind", KINDS)
def test_local_work_runs_while_the_collective_is_in_flight(kind: str) -> None:
    mirrored = ["launch forward", "local forward", "wait forward", "launch backward", "local backward", "wait backward"]
    assert run_ranks(logged, 2, kind, True) == [mirrored] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_without_overlap_it_waits_at_once(kind: str) -> None:
    for log in run_ranks(logged, 2, kind, False):
        assert [entry for entry in log if entry != "not released"] == [
            *("launch forward", "wait forward", "local forward"),
            *("launch backward", "wait backward", "local backward"),
        ]
        assert log.count("not released") == 2


@contextmanager
def counted() -> Iterator[list[Pending]]:
    """Every Pending that is made while open."""
    made: list[Pending] = []
    make = Pending.__init__

    def noted(self: Pending, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        made.append(self)

    Pending.__init__ = noted  # type: ignore[method-assign]
    try:
        yield made
    finally:
        Pending.__init__ = make  # type: ignore[method-assign]


def in_flight(made: list[Pending]) -> int:
    return sum(pending._result is not None for pending in made)


def initial_state_alone(group: Any, exchange: str) -> tuple[int, int]:
    """Gradient of the initial state only: collectives launched, and left in flight."""
    shard = hsp.SequenceParallel(group, linear=exchange).shard(12)
    x = leaves(shard)
    S = torch.zeros(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    out = hsp.linear_attention(*x[:3], log_decay=x[3], shard=shard, initial_state=S)
    assert isinstance(out, Tensor)
    with counted() as made, hsp.ledger() as book:
        torch.autograd.grad(out.sum(), S)
    again = attend("linear", x, shard)  # the group still pairs up
    again.sum().backward()
    return len(book.select(direction="backward")), in_flight(made)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_gradient_of_the_initial_state_alone_leaves_nothing_in_flight(exchange: str) -> None:
    launched = {"all_gather": [1, 1], "ring": [1, 0], "pipeline": [4, 0], "doubling": [1, 0], "star": [1, 1]}[exchange]
    assert run_ranks(initial_state_alone, 2, exchange) == [(calls, 0) for calls in launched]


LOCAL_BACKWARD = [
    (LinearPhases, "intra_backward"),
    (DeltaPhases, "intra_backward"),
    (short_conv.kernel, "local_backward"),
]


def fail_backward_once(group: Any, kind: str) -> int:
    """A backward pass that fails on its way, and another over the same graph with another gradient."""
    shard = hsp.SequenceParallel(group).shard(24)
    x = leaves(shard)
    out = attend(kind, x, shard)
    want = torch.autograd.grad(out.square().sum(), x, retain_graph=True)

    def broken(*_: Any) -> Any:
        raise ArithmeticError("on the way back")

    kernels = [getattr(place, name) for place, name in LOCAL_BACKWARD]
    with counted() as made:
        for module, name in LOCAL_BACKWARD:
            setattr(module, name, broken)
        try:
            with pytest.raises(ArithmeticError):
                torch.autograd.grad(out.sum(), x, retain_graph=True)
        finally:
            for (module, name), kernel in zip(LOCAL_BACKWARD, kernels, strict=True):
                setattr(module, name, kernel)
        got = torch.autograd.grad(out.square().sum(), x)
    for grad, expected in zip(got, want, strict=True):
        assert torch.equal(grad, expected)
    return in_flight(made)


@pytest.mark.parametrize("kind", ["linear", "delta", "conv"])
def test_a_backward_pass_after_one_that_failed_is_its_own(kind: str) -> None:
    assert run_ranks(fail_backward_once, 2, kind) == [0, 0]


def fail_between(group: Any, kind: str, exchange: str) -> int:
    shard = hsp.SequenceParallel(group, linear=exchange).shard(12)
    x = leaves(shard)

    def broken(*_: Any) -> Any:
        raise ArithmeticError("between start and finish")

    places = [(LinearPhases, "intra_forward"), (DeltaPhases, "intra_forward"), (tiled, "attend")]
    places.append((short_conv.kernel, "local_forward"))
    kernels = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, broken)
    try:
        with counted() as made, pytest.raises(ArithmeticError):
            attend(kind, x, shard)
    finally:
        for (module, name), kernel in zip(places, kernels, strict=True):
            setattr(module, name, kernel)
    attend(kind, x, shard).sum().backward()
    assert made
    return in_flight(made)


@pytest.mark.parametrize(("kind", "exchange"), EVERY)
def test_an_exception_between_start_and_finish_drains(kind: str, exchange: str) -> None:
    assert run_ranks(fail_between, 2, kind, exchange) == [0, 0]


def test_waiting_twice_raises() -> None:
    pending = Pending(lambda: 1, what="a gather")
    assert pending.wait() == 1
    with pytest.raises(RuntimeError, match="waited twice for: a gather"):
        pending.wait()
    pending.drain()


def come_apart(group: Any, how: str) -> None:
    shard = hsp.SequenceParallel(group, check="calls").shard(24)
    first = groups.rank(group) == 0
    x, y = leaves(shard), leaves(shard)
    if how == "requires_grad":
        x = [leaf.detach() for leaf in x] if first else x
        attend("linear", x, shard)
    elif how == "shape":
        attend("linear", leaves(shard, heads=2 if first else 3), shard)
    elif how == "documents":
        shards = [shard.sp.shard(24, [0, end, 24]) for end in (7, 8)]  # every rank has both
        attend("linear", x, shards[0 if first else 1])
    elif how == "layout":
        zigzag = hsp.SequenceParallel(group, layout="zigzag", check="calls").shard(24)  # every rank has both
        attend("linear", x, shard if first else zigzag)
    elif how == "kind":
        attend("linear" if first else "softmax", x, shard)
    elif how == "backward order":
        a, b = attend("linear", x, shard), attend("linear", y, shard)
        for out in (a, b) if first else (b, a):
            out.sum().backward()
    else:
        a = attend("linear", x, shard)
        if first:
            a.sum().backward()
        else:
            attend("linear", y, shard)


def said_apart(group: Any, how: str) -> str:
    with pytest.raises(RuntimeError) as caught:
        come_apart(group, how)
    return str(caught.value)


@pytest.mark.parametrize(
    "how", ["requires_grad", "shape", "documents", "layout", "kind", "backward order", "skipped backward"]
)
def test_ranks_that_come_apart_stop_with_one_message(how: str) -> None:
    for message in run_ranks(said_apart, 2, how):
        assert re.search("about to make different collectives(.|\n)*rank 0: (.|\n)*rank 1: ", message)


def checkpointed(
    group: Any, layers: list[str], twice: bool, exchange: str = "all_gather", layout: str = "contiguous"
) -> tuple[int, int, int]:
    """Collectives of the layers without checkpoint, with a plain one, and with recorded states; gradients agree."""
    shard = hsp.SequenceParallel(group, linear=exchange, layout=layout, check="calls").shard(30)
    choose(shard.sp, state_bytes=1)  # measures the link for "auto", as a run does at its start

    def run(**options: Any) -> tuple[int, list[Tensor]]:
        x = leaves(shard)

        def body(h: Tensor) -> Tensor:
            for kind in layers:
                h = h + attend(kind, [h * x[0], h * x[1], h * x[2], x[3]], shard)
            return h

        h = torch.ones_like(x[0]).requires_grad_()
        with hsp.ledger() as book:
            out = checkpoint(body, h, **options) if options else body(h)
            if twice and options:
                torch.autograd.grad(out.sum(), x, retain_graph=True)
            grads = torch.autograd.grad(out.sum(), x)
        return book.calls, list(grads)

    runs = [
        run(),
        run(use_reentrant=False, early_stop=False),
        run(use_reentrant=False, context_fn=hsp.checkpoint_contexts, early_stop=False),
        run(use_reentrant=False, context_fn=hsp.checkpoint_contexts),
        run(use_reentrant=False),
    ]
    for _, grads in runs[1:]:
        for grad, want in zip(grads, runs[0][1], strict=True):
            assert torch.equal(grad, want)
    assert runs[2][0] == runs[3][0]
    return runs[0][0], runs[1][0], runs[2][0]


def test_a_recomputed_forward_asks_nobody_again() -> None:
    assert run_ranks(checkpointed, 2, ["linear"] * 3, False) == [(6, 9, 6)] * 2
    assert run_ranks(checkpointed, 2, ["linear", "softmax", "delta"], False) == [(6, 9, 6)] * 2
    assert run_ranks(checkpointed, 2, ["window", "conv", "window"], False) == [(6, 9, 6)] * 2


@pytest.mark.parametrize("exchange", [name for name in EXCHANGES if name != "all_gather"])
def test_a_recomputed_forward_sends_no_message_again(exchange: str) -> None:
    each = 2 * (4 if exchange == "pipeline" else 1)  # messages of two layers, from rank 0 to rank 1 and back
    want = [(each, each, each), (each, 2 * each, each)] if exchange != "star" else [(4, 6, 4)] * 2
    layers = ["linear", "delta"]
    assert run_ranks(checkpointed, 2, layers, False, exchange) == want
    for plain, again, recorded in run_ranks(checkpointed, 3, layers, False, exchange, "zigzag"):
        assert plain == recorded < again


def test_a_recomputed_forward_chooses_the_same_exchange() -> None:
    for plain, again, recorded in run_ranks(checkpointed, 3, ["linear", "delta"], False, "auto", "zigzag"):
        assert plain == recorded < again


def reentrant(group: Any) -> tuple[int, int]:
    """Collectives of a linear and a softmax layer under a reentrant checkpoint, and what is left in flight."""
    shard = hsp.SequenceParallel(group, layout="zigzag", check="calls").shard(30)

    def body(*x: Tensor) -> Tensor:
        return attend("softmax", [attend("linear", list(x), shard), *x[1:]], shard)

    plain, checkpointed = leaves(shard), leaves(shard)
    body(*plain).sum().backward()
    with counted() as made, hsp.ledger() as book:
        checkpoint(body, *checkpointed, use_reentrant=True).sum().backward()
    for leaf, want in zip(checkpointed, plain, strict=True):
        assert leaf.grad is not None and want.grad is not None and torch.equal(leaf.grad, want.grad)
    return book.calls, in_flight(made)


def test_a_reentrant_checkpoint_is_right_and_communicates_again() -> None:
    assert run_ranks(reentrant, 2) == [(6, 0)] * 2


def test_records_are_read_by_index_not_used_up() -> None:
    assert run_ranks(checkpointed, 2, ["linear", "softmax"], True) == [(4, 10, 6)] * 2


def test_second_derivatives_and_transforms_raise() -> None:
    shard = hsp.SequenceParallel(None).shard(8)
    for kind in ALL:
        x = leaves(shard)
        (dq,) = torch.autograd.grad(attend(kind, x, shard).square().sum(), x[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable|differentiate twice"):
            dq.sum().backward()
        with pytest.raises(RuntimeError):
            torch.func.vmap(lambda q, x=x, kind=kind: attend(kind, [q, *x[1:]], shard))(x[0].detach()[None])
        with pytest.raises(RuntimeError):
            torch.func.jvp(lambda q, x=x, kind=kind: attend(kind, [q, *x[1:]], shard), (x[0],), (x[0],))


@pytest.mark.parametrize("kind", ALL)
def test_autocast_changes_nothing(kind: str) -> None:
    shard = hsp.SequenceParallel(None).shard(70)
    x = [leaf.detach().float() for leaf in leaves(shard)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attend(kind, x, shard)
    assert inside.dtype == torch.float32 and torch.equal(inside, attend(kind, x, shard))


@pytest.mark.parametrize("kind", ALL)
def test_compile_leaves_the_operator_out(kind: str) -> None:
    shard = hsp.SequenceParallel(None).shard(20)
    graphs: list[Any] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    def block(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return attend(kind, [q * 2, k, v, g], shard) + q

    x = leaves(shard)
    out = torch.compile(block, backend=backend)(*x)
    # One graph before the operator and one after: a single break. (What `attend` does around the delta rule and the
    # convolution is a function of its own, with graphs of its own.)
    assert len(graphs) == {"delta": 3, "conv": 4}.get(kind, 2)
    want = block(*x)
    assert torch.equal(out, want)
    for got, expected in zip(
        torch.autograd.grad(out.sum(), x[:3]), torch.autograd.grad(want.sum(), x[:3]), strict=True
    ):
        assert torch.equal(got, expected)


def partial_gradients(group: Any, kind: str, exchange: str) -> None:
    """Each input alone: as the only one that asked for, and as the only one that needs a gradient."""
    shard = hsp.SequenceParallel(group, layout="zigzag", linear=exchange, check="calls").shard(30)
    x = leaves(shard)
    used = x[:3] if kind in ("softmax", "window") else x
    whole = torch.autograd.grad(attend(kind, x, shard).square().sum(), used)
    for i, want in enumerate(whole):
        (asked,) = torch.autograd.grad(attend(kind, x, shard).square().sum(), x[i])
        alone = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(x)]
        (needed,) = torch.autograd.grad(attend(kind, alone, shard).square().sum(), alone[i])
        assert torch.equal(asked, want) and torch.equal(needed, want), f"input {i} on rank {groups.rank(group)}"


@pytest.mark.parametrize(("kind", "exchange"), EVERY)
def test_an_input_alone_has_the_gradient_that_it_has_among_all(kind: str, exchange: str) -> None:
    for world in (1, 2):
        run_ranks(partial_gradients, world, kind, exchange)
