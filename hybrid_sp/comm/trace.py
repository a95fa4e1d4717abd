"""A trace of the ledgers of all ranks, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Each rank is a process with the tracks compute, in flight and exposed: what its operators computed, what was on its way
to it, and when it stood still for that. Clocks agree on one machine; the ranks of another machine are shifted against
it by a time that nobody knows.

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
LANES = 100  # of a track at most: tids of the next one begin here


class _Slice(NamedTuple):
    """What a track shows from `begin` to `end`, in seconds."""

    begin: float
    end: float
    name: str
    args: dict[str, Any]


def rank_events(book: Ledger, rank: int) -> list[Event]:
    """Trace events of one rank, with times in microseconds of its clock; they can be sent to the rank that writes."""
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
    """Write what `rank_events` gave on every rank as one JSON file, times counted from the first of all."""
    events = [event for events in events_of_ranks for event in events]
    start = min((event["ts"] for event in events if event["ph"] == "X"), default=0.0)
    shifted = [event | {"ts": event["ts"] - start} if event["ph"] == "X" else event for event in events]
    shifted.sort(key=lambda event: event.get("ts", -1.0))  # what tracks are called comes first
    path.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": shifted}) + "\n")


def _name(entry: Row | Wait | Phase, what: str) -> str:
    """Such as "linear 3 forward intra": the kind of layer, the number of its call, the direction and what it is."""
    return f"{entry.tag} {entry.call} {entry.direction} {what}"


def _label(kind: str, rank: int, tid: int, **args: Any) -> Event:
    return {"name": kind, "ph": "M", "pid": rank, "tid": tid, "args": args}


def _lanes(slices: list[_Slice]) -> list[list[_Slice]]:
    """Slices that overlap in different lanes: a viewer would take them for one inside the other."""
    lanes: list[list[_Slice]] = []
    for one in sorted(slices, key=lambda one: (one.begin, one.end)):
        free = next((lane for lane in lanes if lane[-1].end <= one.begin), None)
        if free is None:
            lanes.append([one])
        else:
            free.append(one)
    return lanes
