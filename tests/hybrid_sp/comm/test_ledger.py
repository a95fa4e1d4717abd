"""The timeline: what was computed, in flight and waited for, on CUDA by events, and the trace that viewers open."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hybrid_sp as hsp
from hybrid_sp.comm import collectives, groups, ledger, messages
from hybrid_sp.comm.ledger import Ledger, Part, Phase, Row, Wait
from hybrid_sp.comm.pending import Header, Pending
from hybrid_sp.comm.trace import rank_events, write_trace
from hybrid_sp.kernels.reference.linear import LinearPhases
from tests.support.ranks import run_ranks

# The phases that every operator notes, in the order in which it computes them.
PHASES = {
    "linear": (["states", "intra", "fold", "inter"], ["inter", "intra", "fold", "states"]),
    "delta": (["states", "intra", "fold", "inter"], ["inter", "intra", "fold", "states"]),
    "softmax": (["own", "rest"], ["rest", "own"]),
    "conv": (["own", "fold", "halo"], ["halo", "own", "fold"]),
}


def call(kind: str, shard: hsp.Shard) -> Tensor:
    """The output of an operator on tokens of its own."""
    q, k, v = (torch.randn(1, shard.tokens, 2, 8, requires_grad=True) for _ in "qkv")
    if kind == "softmax":
        return hsp.softmax_attention(q, k, v, shard=shard)
    if kind == "conv":
        out = hsp.short_conv(q.flatten(2), torch.randn(16, 4, requires_grad=True), shard=shard)
    elif kind == "delta":
        out = hsp.delta_rule(q, F.normalize(k, dim=-1), v, beta=torch.rand(1, shard.tokens, 2), shard=shard)
    else:
        out = hsp.linear_attention(q, k, v, log_decay=-torch.rand(1, shard.tokens, 2), shard=shard)
    assert isinstance(out, Tensor)
    return out


def phases(group: Any, kind: str, overlap: bool) -> Ledger:
    shard = hsp.SequenceParallel(group, overlap=overlap, check="calls").shard(40)
    call(kind, shard)
    with hsp.ledger() as book:
        call(kind, shard).sum().backward()
    assert {one.call for one in (*book.phases, *book.waits, *book.rows)} == {1}
    return book


@pytest.mark.parametrize("kind", PHASES)
def test_every_operator_notes_what_it_computes(kind: str) -> None:
    for overlap in (True, False):
        for book in run_ranks(phases, 2, kind, overlap):
            tag = "linear" if kind == "delta" else kind
            noted = [(one.tag, one.direction, one.name) for one in book.phases]
            forward, backward = PHASES[kind]
            assert noted == [(tag, "forward", name) for name in forward] + [(tag, "backward", n) for n in backward]
            busy = sorted((one.begin, one.end) for one in (*book.phases, *book.waits))
            assert all(a[1] <= b[0] for a, b in zip(busy, busy[1:], strict=False)), "it computes or waits, not both"


def alone(kind: str) -> list[str]:
    shard = hsp.SequenceParallel(None).shard(40)
    with hsp.ledger() as book:
        call(kind, shard).sum().backward()
    return [one.name for one in book.phases if one.direction == "forward"]


def test_one_device_notes_the_same_phases() -> None:
    assert alone("softmax") == ["own", "rest"] and alone("conv") == ["own", "fold", "halo"]
    assert alone("linear") == alone("delta") == ["states", "intra", "inter"]


class Clock:
    """A clock that moves when told. It is also work, of so many seconds, that a Pending waits for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patch.setattr(ledger, "clock", lambda: self.now)

    def wait(self, seconds: float = 10.0) -> None:
        self.now += seconds


def over_a_slow_link(group: Any) -> dict[str, dict[Part, ledger.Times]]:
    """A gather of 2 s beside local work of 3 s, each way."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)

        def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: (clock.wait(3), function(*args))[1]

        class Slow:
            """Work that has come two seconds after it was launched."""

            def __init__(self, work: Any, messages: int, received: int, device: torch.device) -> None:
                self.work, self.comes = work, clock.now + 2

            def wait(self) -> None:
                self.work.wait()
                clock.now = max(clock.now, self.comes)

        for name in ("intra_forward", "intra_backward"):
            patch.setattr(LinearPhases, name, slowly(getattr(LinearPhases, name)))
        patch.setattr(collectives, "carried", Slow)
        for overlap in (True, False, ("linear",), ("conv", "softmax")):
            shard = hsp.SequenceParallel(group, overlap=overlap).shard(40)
            with hsp.ledger() as book:
                call("linear", shard).sum().backward()
            found[str(overlap)] = book.times()
    return found


def test_times_say_what_was_hidden() -> None:
    hidden, seen = ledger.Times(compute=3, in_flight=3, exposed=0), ledger.Times(compute=3, in_flight=2, exposed=2)
    for found in run_ranks(over_a_slow_link, 2):
        for overlap, times in found.items():
            want = hidden if "linear" in overlap or overlap == "True" else seen
            assert times == {Part("linear", 0, way): want for way in ("backward", "forward")}, overlap


def row(begin: float, end: float | None, **names: Any) -> Row:
    names = {"collective": "all_gather", "tag": "linear", "direction": "forward", "call": 0, "bytes": 8} | names
    return Row(**names, launched=begin, arrived=end)


def test_what_is_in_flight_together_counts_once() -> None:
    book = Ledger()
    book._rows += [row(0, 3), row(1, 2), row(2.5, 4), row(6, 7), row(8, None), row(1, 2, call=1)]
    assert book.times() == {
        Part("linear", 0, "forward"): (0, 5, 0),
        Part("linear", 1, "forward"): (0, 1, 0),
    }


def test_waits_and_phases_within_cut_a_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    names = {"tag": "linear", "direction": "backward", "call": 3}
    with hsp.ledger() as book:
        with ledger.computing("outer", **names):
            clock.wait(1)
            Pending(lambda: None, clock, "a gather", Header(**names)).wait()
            clock.wait(2)
            with ledger.computing("inner", "softmax", "forward", 4):
                clock.wait(4)
            clock.wait(8)
        clock.wait(16)
    pieces = [(one.name, one.begin, one.end) for one in book.phases]
    assert pieces == [("outer", 0, 1), ("outer", 11, 13), ("inner", 13, 17), ("outer", 17, 25)]
    assert [(one.begin, one.end) for one in book.waits] == [(1, 11)] and book.blocked_seconds == 10
    assert book.times() == {
        Part("linear", 3, "backward"): (11, 0, 10),
        Part("softmax", 4, "forward"): (4, 0, 0),
    }


def test_a_phase_costs_nothing_while_no_ledger_is_open() -> None:
    one, other = (ledger.computing("intra", "linear", "forward", 0) for _ in range(2))
    assert type(one) is type(other) is contextlib.nullcontext


def test_what_a_thread_aside_waits_for_is_not_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with hsp.ledger() as book:
        with ledger.computing("outer", "linear", "forward", 0):
            with ledger.background_thread():
                Pending(lambda: None, clock, "a message", Header(tag="linear")).wait()
            thread = threading.Thread(target=lambda: ledger.note_wait(book_wait))
            book_wait = Wait(what="x", tag="linear", direction="forward", call=0, begin=0, end=1)
            thread.start()
            thread.join()
    assert book.waits == [book_wait], "the thread's own: it did not say that it is aside"
    assert [(one.begin, one.end) for one in book.phases] == [(0, 10)], "only its own waits cut a phase"


def recomputed(group: Any) -> Ledger:
    """A block of a second before a linear layer, all else takes none; backward asks for its recomputation."""
    shard = hsp.SequenceParallel(group).shard(40)
    x = torch.randn(1, shard.tokens, 2, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        clock.wait(1)
        out = hsp.linear_attention(x, x, x, shard=shard)
        assert isinstance(out, Tensor)
        return out

    with pytest.MonkeyPatch.context() as patch, hsp.ledger() as book:
        clock = Clock(patch)
        out = checkpoint(block, x, use_reentrant=False, context_fn=hsp.checkpoint_contexts)
        assert isinstance(out, Tensor)
        out.sum().backward()
    return book


def sent_to_one_who_is_late(group: Any) -> list[Wait] | float:
    """The waits of the sender, and when the receiver was there: after the sender had begun to wait."""
    x = torch.zeros(4)
    header = messages.open_exchange(Header(tag="test"), "one message", x, group)
    if groups.rank(group) == 1:
        collectives.barrier(group)
        there = ledger.clock()
        messages.start_receive(x, 0, 0, group, header).wait()
        return there
    with hsp.ledger() as book:
        pending = messages.start_send(x, 1, 0, group, header)
        send = pending._work
        pending._work = SimpleNamespace(wait=lambda: (collectives.barrier(group), send.wait()))
        pending.wait()
    return book.waits


def test_who_waits_until_a_message_has_left_stands_still() -> None:
    (wait,), there = run_ranks(sent_to_one_who_is_late, 2)
    assert wait.begin < there < wait.end and wait.what.startswith("message 0 to rank 1: test forward")


def test_a_recomputed_block_is_no_part_of_the_phase_that_asks_for_it() -> None:
    for book in run_ranks(recomputed, 2):
        noted = [(one.direction, one.name) for one in book.phases]
        assert noted.count(("forward", "intra")) == 2 and noted.count(("backward", "intra")) == 1
        assert all(one.begin == one.end for one in book.phases), book.phases
        assert {one.end for one in book.phases} == {1, 2}, "the block was computed twice"


class FakeEvent:
    """A CUDA event of a device whose clock runs 100 s behind, in milliseconds; the device is 5 s late."""

    late = 5.0
    recorded: list[FakeEvent] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.device = torch.device("cuda", 0)

    def record(self, stream: str) -> None:
        assert stream == "the stream of cuda:0"
        self.at = ledger.clock() + self.late - 100
        self.recorded.append(self)

    def synchronize(self) -> None:
        if ledger.clock() < self.at + 100:
            TIMES.now = self.at + 100

    def elapsed_time(self, later: FakeEvent) -> float:
        assert ledger.clock() >= max(self.at, later.at) + 100, "not waited for"
        return 1e3 * (later.at - self.at)


TIMES: Any = None


def test_on_cuda_moments_are_events_until_the_ledger_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    global TIMES
    TIMES = clock = Clock(monkeypatch)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    assert ledger.moment(device) == 0, "no ledger is open"
    with hsp.ledger() as book:
        with ledger.computing("intra", "linear", "forward", 0, device):
            clock.wait(1)
        here = Row(**NAMES, launched=ledger.moment(device))
        ledger.note_row(here)
        clock.wait(2)
        monkeypatch.setattr(FakeEvent, "late", 20.0)  # another stream, which the next read must wait for
        Pending(lambda: None, clock, "a gather", Header(tag="linear"), here, device).wait()
        monkeypatch.setattr(FakeEvent, "late", 5.0)
        recorded = len(FakeEvent.recorded)
        assert book.bytes == 8 and book.calls == 1 and clock.now == 13, "nothing waits for the device"
    assert recorded == 5
    assert [(one.begin, one.end) for one in book.phases] == [(5, 6)]
    assert (book.rows[0].launched, book.rows[0].arrived) == (6, 33)
    assert book.times() == {Part("linear", 0, "forward"): (1, 27, 10)}
    assert len(FakeEvent.recorded) == recorded + 3, "one moment more each for the rows, the waits and the phases"


NAMES: dict[str, Any] = {"collective": "all_gather", "tag": "linear", "direction": "forward", "call": 0, "bytes": 8}


def valid_events(path: Path) -> list[dict[str, Any]]:
    """The slices of a file in Chromium's trace event format."""
    content = json.loads(path.read_text())
    assert content.keys() == {"traceEvents", "displayTimeUnit"} and content["displayTimeUnit"] in ("ms", "ns")
    events = content["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    for event in events:
        assert event["ph"] in "XM" and isinstance(event["name"], str) and isinstance(event["args"], dict)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
    assert events[-len(slices) :] == slices
    for event in slices:
        assert event.keys() == {"name", "cat", "ph", "pid", "tid", "ts", "dur", "args"}
        assert event["ts"] >= 0 and event["dur"] >= 0
    labels = {"process_name": "name", "process_sort_index": "sort_index"}
    labels |= {"thread_name": "name", "thread_sort_index": "sort_index"}
    for event in events[: -len(slices)]:
        assert event["args"].keys() == {labels[event["name"]]}
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert named == {(event["pid"], event["tid"]) for event in slices}
    times = [event["ts"] for event in slices]
    assert times == sorted(times) and times[0] == 0
    tracks: dict[tuple[int, int], float] = {}
    for event in slices:  # in order of ts: no two of a track overlap (but for the rounding of a sum)
        place = event["pid"], event["tid"]
        assert event["ts"] >= tracks.get(place, 0.0) - 1e-3, event
        tracks[place] = event["ts"] + event["dur"]
    return slices


def traced(group: Any) -> list[dict[str, Any]]:
    shard = hsp.SequenceParallel(group, overlap=("linear",)).shard(40)
    with hsp.ledger() as book:
        x = torch.randn(1, shard.tokens, 2, 8, requires_grad=True)
        (hsp.softmax_attention(x, x, x, shard=shard) + call("linear", shard)).sum().backward()
    return rank_events(book, groups.rank(group))


def test_the_trace_of_all_ranks_is_in_the_trace_event_format(tmp_path: Path) -> None:
    begin = ledger.clock()
    events = run_ranks(traced, 2)
    seconds = ledger.clock() - begin
    write_trace(tmp_path / "trace.json", events)
    slices = valid_events(tmp_path / "trace.json")
    for rank in (0, 1):
        names = {event["cat"]: [] for event in slices}  # type: dict[str, list[str]]
        for event in slices:
            if event["pid"] == rank:
                names[event["cat"]].append(event["name"])
        assert {"linear 1 forward intra", "softmax 0 backward own"} < set(names["compute"])
        assert names["in flight"] == [
            "softmax 0 forward all_gather",
            "linear 1 forward all_gather",
            "linear 1 backward all_gather",
            "softmax 0 backward reduce_scatter",
        ]
        assert sorted(names["exposed"]) == sorted(f"{n.rpartition(' ')[0]} wait" for n in names["in flight"])
    assert max(event["ts"] + event["dur"] for event in slices) < 1e6 * seconds, "microseconds, counted from the first"


def test_slices_that_overlap_lie_in_tracks_of_their_own(tmp_path: Path) -> None:
    book = Ledger()
    book._rows += [row(5, 8), row(6, 7, call=1), row(7.5, 9, call=2), row(8.5, None, call=3)]
    book._phases += [Phase(name="own", tag="linear", direction="forward", call=0, begin=5.5, end=6)]
    write_trace(tmp_path / "trace.json", [rank_events(book, 4)])
    found = {event["name"]: event for event in valid_events(tmp_path / "trace.json")}
    tids = [found[f"linear {call} forward all_gather"]["tid"] for call in range(4)]
    assert tids == [100, 101, 101, 100]
    assert found["linear 0 forward own"]["ts"] == 0.5e6 and found["linear 0 forward own"]["tid"] == 0
    assert found["linear 3 forward all_gather"]["args"] == {"bytes": 8, "awaited": False}
    assert found["linear 0 forward all_gather"]["dur"] == 3e6


def test_an_empty_trace_is_a_trace(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", [rank_events(Ledger(), 0)])
    assert [event["ph"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]] == ["M", "M"]
