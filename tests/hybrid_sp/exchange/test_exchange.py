"""Every exchange of states: results, bytes, rounds, schedule, and what becomes of a rank that does not keep to it."""

from __future__ import annotations

import functools
import itertools
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import groups, ledger, link, messages
from hybrid_sp.comm.link import Link
from hybrid_sp.comm.pending import Header, Pending
from hybrid_sp.exchange import EXCHANGES, Request, Sizes, affine, auto, choose, choose_by, scan
from hybrid_sp.exchange.affine import AffineState
from hybrid_sp.exchange.chain import Chain
from hybrid_sp.exchange.scan import Scan, ScanExchange
from hybrid_sp.kernels.reference.linear import LinearPhases
from hybrid_sp.shard import spans_of
from tests.hybrid_sp.cases import Case, delta_cases, linear_cases, measured, truth
from tests.hybrid_sp.comm.test_collectives import linear_counts
from tests.hybrid_sp.ops.test_parity import LAYOUTS, check_cases, check_family
from tests.support.impatience import Impatience
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

PATIENCE = 300.0  # seconds for another thread, which comes unless something is broken
OTHERS = [name for name in EXCHANGES if name != "all_gather"]
SCANS = [name for name in OTHERS if name != "star"]
Wanted = list[tuple[Case, dict[str, Tensor]]]


@functools.lru_cache
def wanted() -> Wanted:
    """Cases of every transition, with documents, states and a normaliser, and their truth."""
    return [(case, truth(case)) for case in (*linear_cases()[::2], *delta_cases()[1::2])]


def by(exchange: str) -> Wanted:
    return [(replace(case, linear=exchange), want) for case, want in wanted()]


@pytest.mark.parametrize("exchange", OTHERS)
@pytest.mark.parametrize(("world", "layout"), [(2, "zigzag"), (3, "zigzag"), (4, "contiguous")])
def test_parity_fp64(world: int, layout: str, exchange: str) -> None:
    """Checks a third of the cases each; one rank is tested below."""
    check_family(world, layout, by(exchange)[world % 3 :: 3])


def check_in_few_launches(group: Any, cases: Wanted) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "in_few_launches", lambda state: True)
        check_cases(group, cases, 8, 64)


@pytest.mark.parametrize(("world", "layout"), [(3, "zigzag"), (4, "contiguous")])
def test_parity_fp64_of_folds_in_few_launches(world: int, layout: str) -> None:
    cases = [case for name in ("all_gather", "star") for case in by(name)[world % 3 :: 3]]
    run_ranks(
        check_in_few_launches, world, [(replace(case, layout=layout), want) for case, want in cases], deadline=120
    )


@pytest.mark.slow
@pytest.mark.parametrize("exchange", OTHERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_parity_fp64_of_every_case(world: int, layout: str, exchange: str) -> None:
    check_family(world, layout, by(exchange))


def every_third() -> Wanted:
    """Of the cases, by all exchanges and layouts in turn."""
    turns = [(exchange, layout) for exchange in EXCHANGES for layout in LAYOUTS]
    chosen = wanted()[::3] + wanted()[1::3]
    cut = [turns[i % len(turns)] for i in range(len(chosen))]
    return [
        (replace(case, linear=exchange, layout=layout), want)
        for (case, want), (exchange, layout) in zip(chosen, cut, strict=True)
    ]


@pytest.mark.slow
def test_parity_on_eight_ranks() -> None:
    run_ranks(check_cases, 8, every_third()[:8], 8, 64, deadline=120)


def on_columns(_: Any, cases: Wanted) -> list[int]:
    """Groups of every second rank, as where the sequence is the outer axis of a mesh, that run beside each other."""
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    check_cases(group, cases, 8, 64)
    return dist.get_process_group_ranks(group)


def test_neighbours_are_those_of_the_group() -> None:
    cases = every_third()
    assert {case.linear for case, _ in cases} == set(EXCHANGES)
    assert run_ranks(on_columns, 4, cases) == [[0, 2], [1, 3], [0, 2], [1, 3]]


@pytest.mark.parametrize("step", tiered([3], [1]))
@pytest.mark.parametrize("exchange", OTHERS)
def test_one_device_needs_no_process_group(exchange: str, step: int) -> None:
    cases = [(replace(case, linear=exchange, layout="zigzag"), want) for case, want in wanted()[::step]]
    assert check_cases(None, cases, 8, 64) == len(cases)


class Failing:
    """A way through a scan that fails."""

    def __init__(self, scan: Scan) -> None:
        pass

    def run(self, first: Tensor | None) -> Any:
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("aside", [True, False])
def test_an_error_of_the_program_is_none_of_the_network(aside: bool) -> None:
    shard = hsp.SequenceParallel(None).shard(8)
    exchange = ScanExchange(shard, Request(), name="failing", algorithm=Failing, background=aside)
    pending = exchange.launch(Header(tag="linear"), torch.zeros(1, 1, 1, 2, 2), None, None)
    with pytest.raises(torch.OutOfMemoryError):
        pending.wait()


def check_bit_equal(group: Any, cases: list[Case]) -> None:
    """Overlap on and off, and whether a thread drives the scan or whoever waits: not a bit of difference."""
    for name in SCANS:
        made = EXCHANGES[name]
        assert isinstance(made.make, partial)
        turned = {"background": not made.make.keywords["background"]}
        otherwise = made._replace(make=partial(made.make, **turned))
        for case in cases:
            case = replace(case, layout="zigzag", linear=name)
            want = measured(case, group)
            for other, driven in ((replace(case, overlap=False), made), (case, otherwise)):
                EXCHANGES[name] = driven
                got = measured(other, group)
                for key, value in want.items():
                    assert torch.equal(value, got[key]), f"{other} {key} on rank {groups.rank(group)}"
            EXCHANGES[name] = made


@pytest.mark.parametrize("step", tiered([6], [4]))
def test_overlap_and_who_drives_change_no_bit(step: int) -> None:
    run_ranks(check_bit_equal, 3, [case for case, _ in wanted()[::step]])


# -- bytes and rounds -------------------------------------------------------------------------------------------------

H, K, V, B = 4, 8, 6, 2  # of linear_counts
TRANSITIONS = {"none": 0, "fixed": 0, "scalar": 1, "vector": K, "delta": K * K}
STATE = B * H * K * V * 4  # bytes


def chain_bytes(owners: list[int], rank: int) -> int:
    """One state for each of a rank's spans that another rank's precedes."""
    return STATE * sum(a != rank == b for a, b in itertools.pairwise(owners))


def doubling_messages(owners: list[int], rank: int, transition: int) -> list[int]:
    """Bytes of the windows that a rank receives, round by round; one that has reached the first span is a state."""
    messages, d = [], 1
    while d < len(owners):
        for p in range(d, len(owners)):
            if owners[p] == rank != owners[p - d]:
                messages.append(STATE + (p >= 2 * d) * B * H * transition * 4)
        d *= 2
    return messages


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", TRANSITIONS)
def test_bytes_are_those_of_the_formulas(decay: str, layout: str) -> None:
    for world, final in ((2, decay != "delta"), (4, False)):
        place = {span: rank for rank in range(world) for span in spans_of(rank, world, layout)}
        owners = [place[span] for span in range(len(place))]
        got = {name: run_ranks(linear_counts, world, layout, decay, 64, False, final, name) for name in SCANS}
        for rank, last in ((rank, owners[-1]) for rank in range(world)):
            told = [STATE] * (final and rank != last)  # the final state
            summed = [STATE] * (final and rank == last) * (world - 1)  # its gradients
            chain = {
                "forward": chain_bytes(owners, rank) + sum(told),
                "backward": chain_bytes(owners[::-1], rank) + sum(summed),
            }
            for name in ("ring", "pipeline"):
                assert {way: sum(rows) for way, rows in got[name][rank].items()} == chain, f"{name} on rank {rank}"
            windows = {
                "forward": sorted(told + doubling_messages(owners, rank, TRANSITIONS[decay])),
                "backward": sorted(summed + doubling_messages(owners[::-1], rank, TRANSITIONS[decay])),
            }
            rows = {way: sorted(row) for way, row in got["doubling"][rank].items()}
            assert rows == windows, f"doubling on rank {rank}"


def test_a_pipeline_receives_a_fraction_of_what_a_gather_does() -> None:
    for layout in LAYOUTS:
        gather, pipeline = (
            run_ranks(linear_counts, 4, layout, "scalar", 64, False, False, name) for name in ("all_gather", "pipeline")
        )
        for a, b in zip(gather, pipeline, strict=True):
            assert all(3 * sum(b[way]) <= sum(a[way]) for way in ("forward", "backward"))


def test_rounds() -> None:
    """Messages to the last rank: one of a ring, one per block of a pipeline, and of doubling one a round."""
    for world, rounds in ((2, 1), (3, 2), (4, 2), (5, 3), (8, 3)):
        for name, many in (("ring", 1), ("pipeline", 4), ("doubling", rounds)):
            counted = run_ranks(linear_counts, world, "contiguous", "scalar", 64, False, False, name)
            assert len(counted[-1]["forward"]) == len(counted[0]["backward"]) == many, f"{name} on {world} ranks"


# -- the schedule -----------------------------------------------------------------------------------------------------


def schedule(group: Any, exchange: str, sends: int) -> list[str]:
    """Messages sent, and work within chunks, which here lasts until a thread, if there is one, has sent them all."""
    log: list[str] = []
    sent: dict[str, threading.Event] = {}  # by threads, in this direction
    shard = hsp.SequenceParallel(group, linear=exchange).shard(30)
    q, k, v = (torch.randn(1, shard.tokens, 2, 4, requires_grad=True) for _ in "qkv")

    def aside(task: Callable[[], Any], what: str, header: Header, *args: Any) -> Pending:
        sent[header.direction] = threading.Event()
        return run_in_background(task, what, header, *args)

    def send(x: Tensor, to: int, number: int, group: Any, header: Header) -> Pending:
        pending = start_send(x, to, number, group, header)
        log.append(f"send {header.direction}")
        if header.direction in sent and log.count(f"send {header.direction}") == sends:
            sent[header.direction].set()
        return pending

    def working(kernel: Callable[..., Any], way: str, sender: int) -> Callable[..., Any]:
        def work(*args: Any) -> Any:
            if groups.rank(group) == sender and way in sent:
                assert sent[way].wait(PATIENCE)
            log.append(f"local {way}")
            return kernel(*args)

        return work

    run_in_background, start_send = scan.run_in_background, messages.start_send
    kernel = LinearPhases
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "run_in_background", aside)
        patch.setattr(messages, "start_send", send)
        patch.setattr(kernel, "intra_forward", working(kernel.intra_forward, "forward", 0))
        patch.setattr(kernel, "intra_backward", working(kernel.intra_backward, "backward", 1))
        out = hsp.linear_attention(q, k, v, shard=shard)
        assert isinstance(out, Tensor)
        out.sum().backward()
    return log


@pytest.mark.parametrize("exchange", SCANS)
def test_a_thread_sends_during_the_local_work_and_a_ring_after_it(exchange: str) -> None:
    sends = {"ring": 1, "pipeline": 4, "doubling": 1}[exchange]
    log = run_ranks(schedule, 2, exchange, sends)
    for rank, way, other in ((0, "forward", "backward"), (1, "backward", "forward")):
        sent = [f"send {way}"] * sends
        with_work = [f"local {way}", *sent] if exchange == "ring" else [*sent, f"local {way}"]
        assert log[rank] == (with_work + [f"local {other}"] if rank == 0 else [f"local {other}", *with_work])


def crossed(group: Any, exchange: str) -> Tensor:
    """Two exchanges in flight at a time, of call 0 of two shards; on rank 0 the first one sends last."""
    rank, sends, second_is_over = groups.rank(group), Scan.send, threading.Event()

    def late(self: Scan, x: Tensor, to: int, number: int) -> Pending:
        if rank == 0 and x.min() >= 0:
            assert second_is_over.wait(PATIENCE)
        return sends(self, x, to, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scan, "send", late)
        in_flight = []
        for sign in (1.0, -1.0):
            made = EXCHANGES[exchange].make(hsp.SequenceParallel(group).shard(8), Request())
            state = torch.full((1, 1, 1, 2, 4), sign)
            in_flight.append((made, made.launch(Header(tag="linear"), state, None, None)))
        entered = {}
        for place in (1, 0) if rank == 0 else (0, 1):
            made, pending = in_flight[place]
            entered[place] = made.receive(pending.wait())[0].sum()
            second_is_over.set()
    return torch.stack([entered[0], entered[1]])


@pytest.mark.parametrize("exchange", SCANS)
def test_two_exchanges_in_flight_do_not_meet(exchange: str) -> None:
    assert [entered.tolist() for entered in run_ranks(crossed, 2, exchange)] == [[0.0, 0.0], [8.0, -8.0]]


# -- faults -----------------------------------------------------------------------------------------------------------


def faulty(_: Any, exchange: str) -> dict[str, str]:
    """What each rank says where rank 1 commits a fault in call 1."""
    said = {}
    for fault in ("drops a forward exchange", "drops a backward exchange", "swaps its neighbours"):
        group = hsp.init_mesh(dp=1, sp=3)["sp"].get_group()
        shard = hsp.SequenceParallel(group, linear=exchange).shard(12)
        q, k, v = (torch.randn(1, 4, 2, 4, requires_grad=True) for _ in "qkv")
        hsp.linear_attention(q, k, v, shard=shard)
        impatience, said[fault] = Impatience(), "nothing"
        with pytest.MonkeyPatch.context() as patch:
            if groups.rank(group) == 1:
                commit(fault, patch)
            if "backward" not in fault:
                impatience.of_messages(patch)
            try:
                out = hsp.linear_attention(q, k, v, shard=shard)
                assert isinstance(out, Tensor)
                if "backward" in fault:
                    impatience.of_messages(patch)
                out.sum().backward()
            except RuntimeError as error:  # that of a message, or to launch one after others have given up
                said[fault] = str(error)
        impatience.meet()
        dist.barrier()
    return said


def commit(fault: str, patch: pytest.MonkeyPatch) -> None:
    launched, send = ScanExchange._launched, Scan.send

    def dropped(self: ScanExchange, run: Callable[[], Any], header: Header, x: Tensor) -> Pending:
        if (header.direction, header.call) == (fault.split()[2], 1):
            result = (x, x[0]) if header.direction == "backward" else (x, x[0], None)
            return Pending(lambda: result)
        return launched(self, run, header, x)

    def swapped(self: Scan, x: Tensor, to: int, number: int) -> Pending:
        return send(self, x, 2 - to, number)

    if "swaps" in fault:
        patch.setattr(Scan, "send", swapped)
    else:
        patch.setattr(ScanExchange, "_launched", dropped)


@pytest.mark.parametrize("exchange", SCANS)
def test_a_rank_that_does_not_keep_to_the_exchange_is_named(exchange: str) -> None:
    said = run_ranks(faulty, 3, exchange)
    for fault, victim, way in (
        ("drops a forward exchange", 2, "forward"),
        ("drops a backward exchange", 0, "backward"),
        ("swaps its neighbours", 2, "forward"),
    ):
        want = rf"rank {victim} failed in: message \d+ from rank 1: linear {way} call 1 "
        assert re.match(want, said[victim][fault]), f"{fault}: {said[victim][fault]}"


# -- the choice -------------------------------------------------------------------------------------------------------


def seconds(link: Link, sizes: Sizes) -> dict[str, float]:
    return {name: one.seconds(link, sizes) for name, one in EXCHANGES.items() if not one.baseline}


def test_the_model_of_a_link() -> None:
    """The seconds that strategies give, worked out by hand, and the choice by them."""
    link = Link(latency=2.0, bandwidth=10.0)
    got = seconds(link, Sizes(4, "contiguous", 40, 20, True))
    ends = 2 * (2 + 3 * 40 / 10)
    assert got == {
        "all_gather": 3 * (2 + 60 / 10) + 3 * (2 + 80 / 10),
        "ring": 2 * 3 * (2 + 40 / 10) + ends,
        "pipeline": 2 * 6 * (2 + 10 / 10) + ends,
        "doubling": 2 * (2 * 2 + (80 + 20) / 10) + ends,
    }
    assert choose_by(link, Sizes(4, "contiguous", 40, 20, True)).strategy == min(got, key=lambda name: got[name])
    zigzag = seconds(link, Sizes(4, "zigzag", 40))
    assert zigzag["ring"] == 2 * 6 * (2 + 4) and zigzag["pipeline"] == 2 * (6 + 2 * 3) * (2 + 1)
    assert zigzag["doubling"] == 2 * (3 * 2 + 2 * 3 * 40 / 10)


def chosen(group: Any, link: Link | None) -> tuple[list[str], Link | None, int, int]:
    """Strategies for states of little and of much, what the link is, and how much is measured, once and again."""
    sp = hsp.SequenceParallel(group, linear="auto", link=link)
    with hsp.ledger() as first:
        choices = [choose(sp, state_bytes=4**i, transition_bytes=4**i) for i in (3, 15)]
    with hsp.ledger() as again:
        assert choose(sp, state_bytes=64, transition_bytes=64) == choices[0]
    return [choice.strategy for choice in choices], choices[0].link, first.calls, again.calls


def test_all_ranks_choose_alike() -> None:
    slow = Link(latency=1e-3, bandwidth=1e9)
    assert run_ranks(chosen, 4, slow) == [(["doubling", "pipeline"], slow, 0, 0)] * 4
    here = run_ranks(chosen, 4, None)
    assert here.count(here[0]) == 4 and here[0][3] == 0 < here[0][2]
    assert here[0][1] is not None and here[0][1].latency > 0 and here[0][1].bandwidth > 0
    assert choose(hsp.SequenceParallel(None, linear="auto"), state_bytes=8).strategy == "all_gather"
    assert choose(hsp.SequenceParallel(None, linear="ring"), state_bytes=8) == ("ring", None, None)


def pretended(group: Any) -> tuple[float, float]:
    """Latency, and seconds of a megabyte without it, by a clock that moves while the link carries, and then alone."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with pytest.MonkeyPatch.context() as patch, link.slowed(Link(latency=0.02, bandwidth=2**20 / 0.1)):
        patch.setattr(link, "time", SimpleNamespace(sleep=sleep))
        patch.setattr(ledger, "clock", lambda: now)
        found = auto.measure_link(group)
    return found.latency, 2**20 / found.bandwidth


def test_a_slow_link_is_measured() -> None:
    assert run_ranks(pretended, 2) == [pytest.approx((0.02, 0.1), rel=1e-4)] * 2


def test_a_pipeline_has_no_more_blocks_than_a_state_has_value_channels() -> None:
    maps = {0: AffineState(None, torch.zeros(1, 1, 2, 3))}
    scan = Scan(owners=(0,), maps=maps, known_decays=None, needs_last=False, group=None, header=Header(tag="test"))
    assert Chain(scan, blocks=4).blocks == 3


def of_two_minds(group: Any) -> str:
    """Every rank has both shards, and uses another one."""
    sps = [hsp.SequenceParallel(group, linear=name, check="calls") for name in ("all_gather", "ring")]
    shard = [sp.shard(24) for sp in sps][groups.rank(group)]
    x = torch.ones(1, shard.tokens, 2, 4)
    with pytest.raises(RuntimeError) as caught:
        hsp.linear_attention(x, x, x, shard=shard)
    return str(caught.value)


def test_ranks_that_use_different_exchanges_are_told_so() -> None:
    said = (
        r"different collectives:\n  rank 0: all_gather linear forward call 0 .*\n  rank 1: ring linear forward call 0 "
    )
    for message in run_ranks(of_two_minds, 2):
        assert re.search(said, message)
