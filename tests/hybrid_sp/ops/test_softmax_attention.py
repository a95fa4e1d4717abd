"""Key heads that travel a few at a time, kept or asked for again: numbers, order, traffic, what is left."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hybrid_sp as hsp
from hybrid_sp.comm import collectives
from hybrid_sp.comm.pending import Pending
from hybrid_sp.kernels.softmax import tiled
from hybrid_sp.ops import softmax_attention
from tests.hybrid_sp.cases import LONG_DOCUMENTS, SHORT_DOCUMENTS, Case, truth
from tests.hybrid_sp.ops.test_parity import (
    LAYOUTS,
    check_cases,
    check_low_precision,
    check_overlap_is_bit_equal,
    half,
    with_one_device,
)
from tests.hybrid_sp.test_overlap import counted, in_flight
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

WAYS = [(heads, keep) for heads in (None, 1, 2, 3) for keep in (True, False)][1:]  # of 4 key heads, the last 3 + 1


def masks() -> list[Case]:
    """A mask of each kind: those of a whole gather, and those of a few tokens."""
    base = Case(operator="softmax", groups=4, heads=8)
    return [
        base,
        replace(base, causal=False, heads=4),
        replace(base, window=16),
        replace(base, documents=SHORT_DOCUMENTS, heads=4),
        replace(base, documents=LONG_DOCUMENTS, window=50),
        replace(base, documents=LONG_DOCUMENTS, causal=False),
        replace(base, sinks=True, value=10, heads=4),
    ]


def ways(case: Case, **options: Any) -> list[Case]:
    return [replace(case, kv_heads_per_gather=heads, keep_kv=keep, **options) for heads, keep in WAYS]


@functools.lru_cache
def wanted() -> list[tuple[Case, dict[str, Tensor]]]:
    return [(case, truth(case)) for case in masks()]


def cases_of(layout: str) -> list[tuple[Case, dict[str, Tensor]]]:
    return [(way, want) for case, want in wanted() for way in ways(case, layout=layout)]


@pytest.mark.parametrize(("world", "layout"), [(1, "contiguous"), (2, "contiguous"), (3, "zigzag")])
def test_parity(world: int, layout: str) -> None:
    """Checks every second way. There are seven ways per mask, so the next mask takes the other ones."""
    cases = half(cases_of(layout), world, layout)
    assert run_ranks(check_cases, world, cases, 8, 64, deadline=120) == [len(cases)] * world


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_parity_of_every_way(world: int, layout: str) -> None:
    cases = cases_of(layout)
    assert run_ranks(check_cases, world, cases, 8, 64, deadline=120) == [len(cases)] * world


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("world", "layout"), tiered([(2, "zigzag")], [(4, "contiguous")]))
def test_low_precision(world: int, layout: str, dtype: torch.dtype) -> None:
    chosen = [masks()[i] for i in (0, 1, 4)]
    truths = {case: [truth(replace(case, seed=seed), dtype) for seed in range(4)] for case in chosen}
    given = [(way, truths[case]) for case in chosen for way in ways(case, layout=layout)[1::3]]
    run_ranks(check_low_precision, world, with_one_device(given, dtype), dtype, deadline=120)


def test_overlap_off_is_bit_equal() -> None:
    run_ranks(check_overlap_is_bit_equal, 2, [way for case in masks()[::2] for way in ways(case)], deadline=120)


# -- the order ---------------------------------------------------------------------------------------------------------


def few(group: Any, heads: int | None, keep: bool, *, length: int = 30, key_heads: int = 3, **options: Any) -> Any:
    """A shard, and q, k, v of a short sequence on it."""
    sp = hsp.SequenceParallel(group, kv_heads_per_gather=heads, keep_kv=keep, **options)
    shard = sp.shard(length)
    make = torch.Generator().manual_seed(5)
    shapes = [(1, length, 2 * key_heads, 4), *[(1, length, key_heads, 4)] * 2]
    whole = [torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes]
    return shard, [shard.take(x).requires_grad_() for x in whole]


@contextmanager
def noted(log: list[str]) -> Iterator[None]:
    """Launches and waits of collectives, and attention to own keys and to those of others."""
    before = {(collectives, name): getattr(collectives, name) for name in ("start_all_gather", "start_reduce_scatter")}
    before |= {
        (softmax_attention, name): getattr(softmax_attention, name)
        for name in ("attend_tiles", "attend_tiles_backward")
    }

    def collective(start: Callable[..., Pending], name: str) -> Callable[..., Pending]:
        def started(x: Tensor, group: Any, header: Any) -> Pending:
            what = f"{name} {header.note.partition('key heads ')[2].partition(':')[0]}"
            log.append(f"launch {what}")
            pending = start(x, group, header)

            def result() -> Any:
                log.append(f"wait {what}")
                return pending.wait()

            return Pending(result)

        return started

    def work(function: Callable[..., None]) -> Callable[..., None]:
        def run(todo: Any, *args: Any) -> None:
            log.append("own" if any(part.fresh for part in todo) else "rest")
            function(todo, *args)

        return run

    wrapped = [
        collective(start, name) for name, start in zip(("gather", "return"), list(before.values()), strict=False)
    ]
    wrapped += [work(function) for function in list(before.values())[2:]]  # type: ignore[list-item]
    for (module, name), new in zip(before, wrapped, strict=True):
        setattr(module, name, new)
    try:
        yield
    finally:
        for (module, name), old in before.items():
            setattr(module, name, old)


def logged(group: Any, keep: bool, overlap: bool) -> list[list[str]]:
    shard, x = few(group, 1, keep, overlap=overlap)
    forward: list[str] = []
    with noted(forward):
        o = hsp.softmax_attention(*x, shard=shard)
    backward: list[str] = []
    with noted(backward):
        o.sum().backward()
    return [forward, backward]


FORWARD = """launch gather 0, own,
    wait gather 0, launch gather 1, rest,
    wait gather 1, launch gather 2, rest,
    wait gather 2, rest"""
BACKWARD = """rest, launch return 0,
    rest, wait return 0, launch return 1,
    rest, wait return 1, launch return 2,
    own, wait return 2"""
BACKWARD_AGAIN = """launch gather 0, own,
    wait gather 0, launch gather 1, rest, launch return 0,
    wait gather 1, launch gather 2, rest, wait return 0, launch return 1,
    wait gather 2, rest, wait return 1, launch return 2, wait return 2"""


@pytest.mark.parametrize("keep", [True, False])
def test_a_group_of_heads_is_attended_to_while_the_next_is_in_flight(keep: bool) -> None:
    want = [text.replace("\n   ", "").split(", ") for text in (FORWARD, BACKWARD if keep else BACKWARD_AGAIN)]
    assert run_ranks(logged, 2, keep, True) == [want] * 2


@pytest.mark.parametrize("keep", [True, False])
def test_without_overlap_every_launch_is_waited_for_at_once(keep: bool) -> None:
    for rank in run_ranks(logged, 2, keep, False):
        for log in rank:
            for entry, after in itertools.pairwise([*log, ""]):
                assert not entry.startswith("launch") or after == entry.replace("launch", "wait")


# -- what travels ------------------------------------------------------------------------------------------------------


def traffic(group: Any, heads: int | None, keep: bool, window: int | None) -> list[tuple[str, str, int]]:
    shard, x = few(group, heads, keep, check="calls", layout="zigzag")
    x = [leaf.detach().bfloat16().requires_grad_() for leaf in x]
    with hsp.ledger() as book:
        hsp.softmax_attention(*x, shard=shard, window=window).float().sum().backward()
    return [(row.collective, row.direction, row.bytes) for row in book.rows]


@pytest.mark.parametrize("keep", [True, False])
def test_groups_together_receive_what_one_gather_does(keep: bool) -> None:
    """2 (P-1) B T G D numbers of bf16 forward, as many of fp32 backward, and the first again if not kept."""
    forward, again, backward = ("all_gather", "forward"), ("all_gather", "backward"), ("reduce_scatter", "backward")
    each = 2 * 1 * 15 * 4 * 2  # 2 (P-1) T D, in bf16
    for heads, sizes in ((None, [3]), (1, [1, 1, 1]), (2, [2, 1]), (7, [3])):
        want = [(*forward, each * size) for size in sizes] + [(*backward, 2 * each * size) for size in sizes]
        want += [] if keep else [(*again, each * size) for size in sizes]
        assert [sorted(rows) for rows in run_ranks(traffic, 2, heads, keep, None)] == [sorted(want)] * 2


@pytest.mark.parametrize("keep", [True, False])
def test_groups_together_receive_what_a_window_sees(keep: bool) -> None:
    for whole, split in zip(*(run_ranks(traffic, 4, heads, keep, 3) for heads in (None, 1)), strict=True):
        assert len(split) == 3 * len(whole) and {row[0] for row in split} == {"all_to_all"}
        for way in ("forward", "backward"):
            assert sum(row[2] for row in split if row[1] == way) == sum(row[2] for row in whole if row[1] == way)


# -- what is left ------------------------------------------------------------------------------------------------------


def partial_gradients(group: Any) -> None:
    """Each input alone: as the only one that is asked for, and as the only one that needs a gradient."""
    for heads, keep in ((1, True), (1, False), (None, False)):
        shard, x = few(group, heads, keep, check="calls", layout="zigzag")
        whole = torch.autograd.grad(hsp.softmax_attention(*x, shard=shard).square().sum(), x)
        with counted() as made:
            for i, want in enumerate(whole):
                (asked,) = torch.autograd.grad(hsp.softmax_attention(*x, shard=shard).square().sum(), x[i])
                alone = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(x)]
                (needed,) = torch.autograd.grad(hsp.softmax_attention(*alone, shard=shard).square().sum(), alone[i])
                where = f"input {i}, {heads} heads, {keep=} on rank {shard.sp.rank}"
                assert torch.equal(asked, want) and torch.equal(needed, want), where
        assert made and in_flight(made) == 0


def test_an_input_alone_has_the_gradient_that_it_has_among_all() -> None:
    for world in (1, 2):
        run_ranks(partial_gradients, world)


def queries_alone(group: Any) -> list[str]:
    """Collectives of a backward pass in which keys and values need no gradient."""
    shard, (q, k, v) = few(group, 1, False)
    o = hsp.softmax_attention(q, k.detach(), v.detach(), shard=shard)
    with hsp.ledger() as book:
        o.sum().backward()
    return [row.collective for row in book.rows]


def test_gradients_that_nobody_needs_do_not_travel() -> None:
    assert run_ranks(queries_alone, 2) == [["all_gather"] * 3] * 2


def fail(group: Any, keep: bool, name: str, at: int) -> int:
    """The kernel fails the at-th time: what is left in flight, after which the group still pairs up."""
    shard, x = few(group, 1, keep, check="calls")
    kernel, calls = getattr(tiled, name), itertools.count(1)

    def broken(*args: Any) -> Any:
        if next(calls) == at:
            raise ArithmeticError("in the middle")
        return kernel(*args)

    setattr(tiled, name, broken)
    try:
        with counted() as made, pytest.raises(ArithmeticError):
            hsp.softmax_attention(*x, shard=shard, causal=False).sum().backward()
    finally:
        setattr(tiled, name, kernel)
    hsp.softmax_attention(*x, shard=shard).sum().backward()
    assert made
    return in_flight(made)


@pytest.mark.parametrize("name", ["attend", "attend_backward"])
@pytest.mark.parametrize("keep", [True, False])
def test_an_exception_leaves_nothing_in_flight(keep: bool, name: str) -> None:
    for at in (1, 2, 3):
        assert run_ranks(fail, 2, keep, name, at) == [0, 0]


def checkpointed(group: Any, heads: int, keep: bool) -> list[int]:
    """Collectives of two layers without checkpoint, with a plain one, and with records; the kernel's calls with
    records beside those without. The gradients are the same."""
    shard, x = few(group, heads, keep, check="calls")
    kernel, calls = tiled.attend, itertools.count()

    def attend(*args: Any) -> Any:
        next(calls)
        return kernel(*args)

    def body(h: Tensor) -> Tensor:
        for _ in range(2):
            h = h + hsp.softmax_attention(h * x[0], h[:, :, ::2] * x[1], x[2], shard=shard, causal=False)
        return h

    def run(**options: Any) -> tuple[list[int], list[Tensor]]:
        h = torch.ones_like(x[0]).requires_grad_()
        with hsp.ledger() as book:
            before = next(calls)
            out = checkpoint(body, h, use_reentrant=False, **options) if options else body(h)
            torch.autograd.grad(out.sum(), x, retain_graph=True)
            grads = torch.autograd.grad(out.sum(), [h, *x])
        return [book.calls, next(calls) - before - 1], list(grads)

    tiled.attend = attend
    try:
        plain = run()
        runs = [run(early_stop=False), run(context_fn=hsp.checkpoint_contexts), run(early_stop=True)]
        runs.append(run(context_fn=hsp.checkpoint_contexts, early_stop=False))
    finally:
        tiled.attend = kernel
    for _, grads in runs:
        assert all(torch.equal(a, b) for a, b in zip(grads, plain[1], strict=True))
    assert runs[1][0] == runs[3][0]
    return [*plain[0], *runs[0][0], *runs[1][0]]


def test_a_recomputed_forward_asks_nobody_again() -> None:
    """Two layers of three groups, forward once and backward twice. Where keys are kept they are recorded, and attended
    to again; where they are not, the result is recorded."""
    layers, groups = 2, 3
    forward, attended = layers * groups, layers * (1 + groups)
    assert (
        run_ranks(checkpointed, 2, 1, True)
        == [[3 * forward, attended, 5 * forward, 3 * attended, 3 * forward, 3 * attended]] * 2
    )
    assert (
        run_ranks(checkpointed, 2, 1, False)
        == [[5 * forward, attended, 7 * forward, 3 * attended, 5 * forward, attended]] * 2
    )


@pytest.mark.parametrize("heads", [0, -1, 1.0, True, "2"])
def test_refusals(heads: Any) -> None:
    with pytest.raises(ValueError, match=f"kv_heads_per_gather must be None or at least 1, got {heads!r}"):
        hsp.SequenceParallel(None, kv_heads_per_gather=heads)
