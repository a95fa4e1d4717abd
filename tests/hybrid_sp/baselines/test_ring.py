"""The ring's schedule, and what becomes of it when a rank fails on the way, leaves a hop out or mixes two up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hybrid_sp as hsp
from hybrid_sp.baselines import left_product, ring_attention
from hybrid_sp.comm import groups, messages
from hybrid_sp.comm.pending import CommunicationError, Header, Pending
from tests.hybrid_sp.baselines.test_baselines import LAYERS, leaves, loss
from tests.hybrid_sp.cases import Case
from tests.hybrid_sp.test_overlap import counted, in_flight
from tests.support.impatience import Impatience
from tests.support.ranks import run_ranks


def logged(group: Any, overlap: bool) -> list[str]:
    """Launches of hops by number, visits, and waits, of one call forward and backward."""
    log: list[str] = []
    shift = messages.start_shift
    visits = {name: getattr(ring_attention, name) for name in ("attend_tiles", "attend_tiles_backward")}

    def launched(x: torch.Tensor, number: int, *args: Any) -> Pending:
        log.append(f"launch {number}")
        pending = shift(x, number, *args)

        def waited() -> Any:
            log.append(f"wait {number}")
            return pending.wait()

        return Pending(waited)

    def noted(name: str) -> Callable[..., None]:
        def visit(*args: Any) -> None:
            log.append("visit")
            visits[name](*args)

        return visit

    sp = hsp.SequenceParallel(group, softmax="ring", overlap=overlap)
    x = torch.randn(1, 4, 2, 4, requires_grad=True)
    try:
        messages.start_shift = launched
        for name in visits:
            setattr(ring_attention, name, noted(name))
        hsp.softmax_attention(x, x, x, shard=sp.shard(12)).sum().backward()
    finally:
        messages.start_shift = shift
        for name, visit in visits.items():
            setattr(ring_attention, name, visit)
    return log


def test_the_next_hop_is_in_flight_while_the_present_block_is_visited() -> None:
    """In backward 0 and 2 are blocks, and 1, 3, 4 the sums of their gradients, of which the last comes home."""
    forward = "launch 0, visit, wait 0, launch 1, visit, wait 1, visit"
    backward = (
        "launch 0, visit, launch 1, wait 0, launch 2, visit, wait 1, launch 3, wait 2, visit, wait 3, launch 4, wait 4"
    )
    assert run_ranks(logged, 3, True) == [[*forward.split(", "), *backward.split(", ")]] * 3
    forward = "launch 0, wait 0, visit, launch 1, wait 1, visit, visit"
    backward = (
        "launch 0, wait 0, visit, launch 1, wait 1, launch 2, wait 2, visit, launch 3, wait 3, visit, launch 4, wait 4"
    )
    assert run_ranks(logged, 3, False) == [[*forward.split(", "), *backward.split(", ")]] * 3


def fail_on_the_way(group: Any) -> list[int]:
    """Every rank fails at its second visit; then the group still pairs up."""
    left = []

    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        visits = iter(range(9))

        def run(*args: Any) -> Any:
            if next(visits) == 1:
                raise ArithmeticError("on the way")
            return function(*args)

        return run

    places = [(ring_attention, "attend_tiles"), (ring_attention, "attend_tiles_backward")]
    places += [(left_product, "causal_forward"), (left_product, "causal_backward")]
    for case in LAYERS[-2:]:
        for module, name in places:
            shard, x = leaves(case, group)
            function = getattr(module, name)
            setattr(module, name, broken(function))
            try:
                with counted() as made:
                    try:
                        loss(case, x, shard).backward()
                    except ArithmeticError:
                        left.append(in_flight(made))
            finally:
                setattr(module, name, function)
            loss(case, x, shard).backward()
    return left


def test_an_exception_on_the_way_leaves_nothing_in_flight() -> None:
    assert run_ranks(fail_on_the_way, 2) == [[0] * 4] * 2


def one_hop(group: Any) -> None:
    x = torch.full((3,), float(groups.rank(group)))
    header = Header(tag="test")
    messages.open_exchange(header, "ring", x, group)
    with hsp.ledger() as book:
        got = messages.start_shift(x, 0, group, header).wait()
    size = groups.size(group)
    assert got.tolist() == [float((groups.rank(group) - 1) % size)] * 3
    assert book.bytes == (12 if size > 1 else 0)


def test_a_hop_goes_to_the_next_rank_of_the_group() -> None:
    for world in (1, 2, 3):
        run_ranks(one_hop, world)


# The number of the hop that each rank waits for in vain where rank 1 makes its own wrong.
IN_VAIN = {"swapped": [0, 0, 0], "left out": [1, 2, 1]}


def damaged(group: Any, how: str, case: Case) -> str:
    """What a rank says where rank 1 swaps the numbers of its hops, or leaves out the second one."""
    shard, x = leaves(case, group)
    shift, impatience, me = messages.start_shift, Impatience(), shard.sp.rank

    def started(x: torch.Tensor, number: int, *args: Any) -> Pending:
        if me == 1 and how == "left out" and number == 1:
            return Pending(lambda: x)
        with pytest.MonkeyPatch.context() as brief:
            if number == IN_VAIN[how][me]:
                impatience.of_batches(brief)
            return shift(x, number ^ (me == 1 and how == "swapped"), *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "start_shift", started)
        with pytest.raises(CommunicationError) as caught:
            loss(case, x, shard)
    return str(caught.value)


@pytest.mark.parametrize(("how", "case"), [("swapped", LAYERS[-1]), ("left out", LAYERS[-2])])
def test_a_hop_that_goes_wrong_fails_and_says_where(how: str, case: Case) -> None:
    said = run_ranks(damaged, 3, how, case)
    numbers = {"swapped": [0, 1, 0], "left out": [1, 2, 1]}[how]
    ends = ["to rank 1 and from rank 2", "to rank 2 and from rank 0", "to rank 0 and from rank 1"]
    wanted = [f"message {number} {end}" for number, end in zip(numbers, ends, strict=True)]
    for rank, (message, what) in enumerate(zip(said, wanted, strict=True)):
        assert message.startswith(f"rank {rank} failed in: {what}: {case.operator} forward call 0 ["), said
