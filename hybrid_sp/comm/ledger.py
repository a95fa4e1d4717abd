"""The ledger: a record of communication, of the time operators waited for it, and of computation meanwhile.

    with hsp.ledger() as book: ...

book.rows     the collectives and messages that this rank received, in launch order
book.waits    the intervals in which an operator was blocked by one of them
book.phases   the intervals in which an operator computed

Several ledgers may be open at once.

Moments are seconds of `clock`, which all processes of a machine share. On CUDA a moment is an event on the current
stream. It becomes seconds when the ledger is read. Only that reading waits for these events.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

clock = time.perf_counter  # seconds


@dataclass(kw_only=True)
class Row:
    """The record of one collective or message on this rank: bytes received, time of launch, time of arrival.

    `arrived` is the moment at which the operator that waited went on. The data may have arrived earlier.
    """

    collective: str
    tag: str
    direction: str
    call: int
    bytes: int
    launched: float
    arrived: float | None = None  # None: nobody has waited for it yet


@dataclass(frozen=True, kw_only=True)
class Wait:
    """The interval, from `begin` to `end`, in which an operator was blocked: exposed time.

    It waited for data to arrive, or for its own message to leave.
    """

    what: str
    tag: str
    direction: str
    call: int
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The computation of one part of an operator, from `begin` to `end`. Waits and inner phases cut it into pieces."""

    name: str
    tag: str
    direction: str
    call: int
    begin: float
    end: float


class Part(NamedTuple):
    """The key of one direction of one operator call: kind of layer, number of the call, "forward" or "backward"."""

    tag: str
    call: int
    direction: str


class Times(NamedTuple):
    """The seconds in which an operator computed, had anything in flight, and was blocked.

    The difference of `in_flight` and `exposed` was hidden.
    """

    compute: float
    in_flight: float
    exposed: float


class Ledger:
    """The record of everything that happened while it was open. A group of one rank makes no collectives."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._waits: list[Wait] = []
        self._phases: list[Phase] = []

    @property
    def rows(self) -> list[Row]:
        seconds = _Seconds()
        for row in self._rows:
            row.launched, row.arrived = seconds.of(row.launched), seconds.of(row.arrived)
        return self._rows

    @property
    def waits(self) -> list[Wait]:
        self._waits[:] = _settled(self._waits)
        return self._waits

    @property
    def phases(self) -> list[Phase]:
        self._phases[:] = _settled(self._phases)
        return self._phases

    def select(self, collective: str | None = None, tag: str | None = None, direction: str | None = None) -> list[Row]:
        """Return the rows that match every given field."""
        wanted = (("collective", collective), ("tag", tag), ("direction", direction))
        return [row for row in self._rows if all(want in (None, getattr(row, name)) for name, want in wanted)]

    @property
    def calls(self) -> int:
        return len(self._rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self._rows)

    @property
    def blocked_seconds(self) -> float:
        return sum(wait.end - wait.begin for wait in self.waits)

    def times(self) -> dict[Part, Times]:
        """Add up the times of each part of an operator call, in order of tag, call and direction.

        Calls with the same number are added up. Recomputation in backward counts as forward. A row that nobody has
        waited for counts as no time in flight.
        """

        def by_part(entries: Sequence[Any]) -> dict[Part, list[Any]]:
            found: dict[Part, list[Any]] = {}
            for entry in entries:
                found.setdefault(Part(entry.tag, entry.call, entry.direction), []).append(entry)
            return found

        rows, waits, phases = by_part(self.rows), by_part(self.waits), by_part(self.phases)
        return {
            part: Times(
                compute=sum(phase.end - phase.begin for phase in phases.get(part, ())),
                in_flight=_covered(
                    (row.launched, row.arrived) for row in rows.get(part, ()) if row.arrived is not None
                ),
                exposed=sum(wait.end - wait.begin for wait in waits.get(part, ())),
            )
            for part in sorted({*rows, *waits, *phases})
        }


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Add up the seconds that lie in any of the intervals."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


_open: list[Ledger] = []


class _Thread(threading.local):
    """The state of a thread: its `phase`, and `aside` if it computes for no operator, so that its waits expose
    nothing."""

    aside: bool = False
    phase: _Computing | None = None


_thread = _Thread()


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Count this rank's collectives: `with ledger() as book: ...`, then `book.calls`, `book.bytes`, `book.rows`."""
    book = Ledger()
    _open.append(book)
    try:
        yield book
    finally:
        _open.remove(book)


@contextmanager
def background_thread() -> Iterator[None]:
    """Exclude this thread's waits from the ledger: no operator waits here."""
    before, _thread.aside = _thread.aside, True
    try:
        yield
    finally:
        _thread.aside = before


def computing(
    name: str, tag: str, direction: str, call: int, device: torch.device | None = None
) -> AbstractContextManager[None]:
    """Note the computation inside as a phase. This costs next to nothing while no ledger is open."""
    return _Computing(name, tag, direction, call, device) if _open else nullcontext()


class _Computing:
    """The phase in progress. A wait or another phase inside it ends its present piece and starts a new one."""

    def __init__(self, name: str, tag: str, direction: str, call: int, device: torch.device | None) -> None:
        self._names: dict[str, Any] = {"name": name, "tag": tag, "direction": direction, "call": call}
        self._device = device

    def __enter__(self) -> None:
        self._outer, _thread.phase = _thread.phase, self
        self._begin = moment(self._device)
        if self._outer is not None:
            self._outer.cut(self._begin, self._begin)

    def __exit__(self, *error: object) -> None:
        end = moment(self._device)
        self.cut(end, end)
        _thread.phase = self._outer
        if self._outer is not None:
            self._outer._begin = end

    def cut(self, end: float, begin: float) -> None:
        """End the present piece at `end`, and begin the next one at `begin`."""
        for book in _open:
            book._phases.append(Phase(**self._names, begin=self._begin, end=end))
        self._begin = begin


def note_row(row: Row) -> None:
    for book in _open:
        book._rows.append(row)


def note_wait(wait: Wait) -> None:
    if _thread.aside:
        return
    if _thread.phase is not None:
        _thread.phase.cut(wait.begin, wait.end)
    for book in _open:
        book._waits.append(wait)


def moment(device: torch.device | None = None) -> float:
    """Return the present moment; on CUDA an event that the current stream records when it gets here."""
    if device is None or device.type != "cuda" or not _open:
        return clock()
    return _event(device)


def _event(device: torch.device) -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class _Seconds:
    """The conversion of events into seconds of `clock`, counted back from now. It waits for these events only."""

    def __init__(self) -> None:
        self._now: dict[torch.device, tuple[Any, float]] = {}

    def of(self, when: Any) -> Any:
        if not isinstance(when, torch.cuda.Event):
            return when
        if when.device not in self._now:
            now = _event(when.device)
            now.synchronize()
            self._now[when.device] = now, clock()
        now, at = self._now[when.device]
        when.synchronize()
        return at - when.elapsed_time(now) / 1e3


def _settled(entries: list[Any]) -> list[Any]:
    if not any(isinstance(entry.begin, torch.cuda.Event) for entry in entries):
        return entries
    seconds = _Seconds()
    return [replace(entry, begin=seconds.of(entry.begin), end=seconds.of(entry.end)) for entry in entries]
