"""The trace of the ledgers of all ranks, for Perfetto (ui.perfetto.dev) and chrome://tracing.

Each rank is a process with three tracks:

    compute     what its operators computed
    in flight   what was on its way to it
    exposed     the times at which an operator was blocked

Clocks agree on one machine. The ranks of another machine are shifted by an unknown time.

Source: the trace event format of Chromium's catapult project, "JSON object format", complete and metadata events.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .ledger import Ledger, Phase, Row, Wait

Event = dict[str, Any]

TRACKS = ("compute", "in flight", "exposed")
LANES = 100  # most lanes of a track: the tids of the next track begin here


class _Slice(NamedTuple):
    """The content of a track from `begin` to `end`, in seconds."""

    begin: float
    end: float
    name: str
    args: dict[str, Any]


def rank_events(book: Ledger, rank: int) -> list[Event]:
    """Return one rank's trace events, in microseconds of its clock; they can be sent to the rank that writes the
    file."""
    rows, waits, phases = book.rows, book.waits, book.phases
    last = max((x for row in rows for x in (row.launched, row.arrived) if x is not None), default=0.0)
    tracks = {
        "compute": [_Slice(phase.begin, phase.end, _name(phase, phase.name), {}) for phase in phases],
        "in flight": [
            _Slice(
                row.launched,
                last if row.arrived is None else row.arrived,
                _name(row, row.collective),
                {"bytes": row.bytes, "awaited": row.arrived is not None},
            )
            for row in rows
        ],
        "exposed": [_Slice(wait.begin, wait.end, _name(wait, "wait"), {"for": wait.what}) for wait in waits],
    }
    events = [
        _label("process_name", rank, 0, name=f"rank {rank}"),
        _label("process_sort_index", rank, 0, sort_index=rank),
    ]
    for number, track in enumerate(TRACKS):
        for lane, slices in enumerate(_lanes(tracks[track])):
            tid = number * LANES + lane
            events += [
                _label("thread_name", rank, tid, name=track),
                _label("thread_sort_index", rank, tid, sort_index=tid),
            ]
            for begin, end, name, args in slices:
                times = {"ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
                events.append({"name": name, "cat": track, "ph": "X", "pid": rank, "tid": tid, **times, "args": args})
    return events


def write_trace(path: Path, events_of_ranks: Sequence[list[Event]]) -> None:
    """Write the events that `rank_events` gave on every rank as one JSON file, with times from the first event."""
    events = [event for events in events_of_ranks for event in events]
    start = min((event["ts"] for event in events if event["ph"] == "X"), default=0.0)
    shifted = [event | {"ts": event["ts"] - start} if event["ph"] == "X" else event for event in events]
    shifted.sort(key=lambda event: event.get("ts", -1.0))  # the names of tracks come first
    path.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": shifted}) + "\n")


def _name(entry: Row | Wait | Phase, what: str) -> str:
    """Name an entry, such as "linear 3 forward intra": kind of layer, number of the call, direction and `what`."""
    return f"{entry.tag} {entry.call} {entry.direction} {what}"


def _label(kind: str, rank: int, tid: int, **args: Any) -> Event:
    return {"name": kind, "ph": "M", "pid": rank, "tid": tid, "args": args}


def _lanes(slices: list[_Slice]) -> list[list[_Slice]]:
    """Put slices that overlap into different lanes: a viewer would draw one inside the other."""
    lanes: list[list[_Slice]] = []
    for one in sorted(slices, key=lambda one: (one.begin, one.end)):
        free = next((lane for lane in lanes if lane[-1].end <= one.begin), None)
        if free is None:
            lanes.append([one])
        else:
            free.append(one)
    return lanes
