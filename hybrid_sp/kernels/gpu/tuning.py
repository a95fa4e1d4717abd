"""The table of launch parameters, by shape and architecture: measured entries, and defaults for all others.

    role              what it sets                     rows x columns of its key
    segments          programs                         K x V
    scan              columns, warps, stages           of the states of one launch
    summary           rows, columns, warps, stages     of the states
    fold              columns, warps, stages           of the states
    within            warps, stages                    1 x 1; `scalar_decay.py`
    keys_forward ...  columns, warps, stages           K x V; the four kernels of `vector_decay.py`

An entry is a pure function of role, shape, dtype and architecture. No model is timed while it runs. All ranks with the
same device and the same file therefore use the same entry, sum in the same order, and get the same bits. Ranks of one
run must have the same architecture.

Measured entries are in `tuned.json`, by architecture and key. `python -m analysis.bench tune` writes them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("tuned.json")
SMALL = ("sm_86", "sm_89", "sm_120", "sm_121")  # 99 KiB of shared memory for a program
INTERPRETER = "interpreter"  # the architecture of tensors on a CPU
ROLES = (
    *("segments", "scan", "summary", "fold", "within"),
    *("keys_forward", "keys_backward", "queries_forward", "queries_backward"),
)
PROGRAMS = 512  # the default: segments x batch x heads that are enough to fill a device


class Entry(NamedTuple):
    """The launch parameters of one kernel and shape. A field that the role does not have is 0.

    programs  segments x batch x heads among which the tokens are divided
    rows      rows of a state in a program: BD
    columns   columns of a state in a program: BW; numbers of a state (fold); key channels at a time (vector decays)
    warps     warps of a program
    stages    chunks whose loads are in flight or in use; 1 loads a chunk when it is needed
    """

    programs: int = 0
    rows: int = 0
    columns: int = 0
    warps: int = 0
    stages: int = 0


_trial: dict[str, Entry] = {}  # entries that replace all others inside `trying`
_watchers: list[dict[str, Entry]] = []


def entry(
    role: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device, kind: tuple[str, ...] = ()
) -> Entry:
    """Return the launch parameters of a kernel. `kind` tells the variants of a role apart, in words."""
    here, architecture = key(role, rows, columns, dtype, kind), architecture_of(device)
    found = _trial.get(here) or measured().get(architecture, {}).get(here)
    found = found or _default(role, rows, columns, dtype, architecture, kind)
    for watcher in _watchers:
        watcher[here] = found
    return found


def key(role: str, rows: int, columns: int, dtype: torch.dtype, kind: tuple[str, ...] = ()) -> str:
    """Return the key of an entry in the table, such as "scan computed scalar 128x128 bfloat16"."""
    return " ".join([role, *kind, f"{rows}x{columns}", str(dtype).removeprefix("torch.")])


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Return the name of a device's architecture, such as sm_90."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def measured() -> dict[str, dict[str, Entry]]:
    """Read the measured entries, by architecture and key: once per process."""
    return {
        architecture: {key: Entry(**numbers) for key, numbers in entries.items()}
        for architecture, entries in json.loads(TABLE.read_text()).items()
    }


def write(architecture: str, entries: Mapping[str, Entry]) -> None:
    """Add entries of an architecture to `tuned.json`, in place of those with the same keys."""
    table = {**measured(), architecture: {**measured().get(architecture, {}), **entries}}
    numbers = {
        name: {key: {field: n for field, n in one._asdict().items() if n} for key, one in sorted(here.items())}
        for name, here in sorted(table.items())
    }
    TABLE.write_text(json.dumps(numbers, indent=1) + "\n")
    measured.cache_clear()


@contextmanager
def trying(entries: Mapping[str, Entry]) -> Iterator[None]:
    """Use these entries, by key, in place of measured ones and defaults: to time candidates."""
    before = dict(_trial)
    _trial.update(entries)
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)


@contextmanager
def watching() -> Iterator[dict[str, Entry]]:
    """Yield the entries that are asked for inside the context, by key."""
    asked: dict[str, Entry] = {}
    _watchers.append(asked)
    try:
        yield asked
    finally:
        _watchers.remove(asked)


def candidates(key: str, default: Entry) -> list[Entry]:
    """Return at most five entries to time for a key, the default first. Those of 16-bit tokens fit on sm_90."""
    role, *kind, shape, dtype = key.split()
    tall = power(int(shape.partition("x")[0]))
    changes: list[dict[str, int]] = [{"columns": n, "warps": m} for n in (16, default.columns) for m in (4, 8)]
    if role == "segments":
        changes = [{"programs": n} for n in (128, 256, 512, 1024)]
    elif role == "fold":
        changes = [{"columns": n, "stages": m} for n, m in ((512, 4), (1024, 2), (1024, 4), (2048, 4))]
    elif role == "within" or dtype == "float32":
        changes = [{"warps": n} for n in (1, 2, 4, 8)]
    elif role == "scan":
        tiles: tuple[tuple[int, int, int], ...] = ((64, 4, 3), (64, 8, 3), (64, 4, 2), (32, 4, 3))
        if tall > 128:  # shared memory holds two chunks
            tiles = ((16, 4, 2), (16, 8, 2), (32, 4, 2) if "gate" not in kind else (32, 8, 2))
        elif tall == 128 and "gate" in kind:  # four warps have no room for 64 columns
            tiles = ((64, 8, 2), (32, 8, 3), (32, 4, 2), (32, 4, 3))
        elif tall == 128:
            tiles = ((64, 4, 2), (64, 8, 3), (32, 4, 2), (32, 4, 3))
        changes = [{"columns": min(n, default.columns), "warps": m, "stages": stages} for n, m, stages in tiles]
    elif role == "summary":
        tiles = ((64, 4, 2), (64, 4, 3), (128, 4, 3), (128, 8, 3))
        changes = [{"rows": n, "columns": n, "warps": m, "stages": stages} for n, m, stages in tiles]
    return list(dict.fromkeys([default, *(default._replace(**change) for change in changes)]))[:5]


def _default(role: str, rows: int, columns: int, dtype: torch.dtype, architecture: str, kind: tuple[str, ...]) -> Entry:
    """Choose launch parameters that fit the chip, from compiled code alone (analysis/results/kernels/aot.md)."""
    exact = dtype.itemsize == 4  # products without TF32 are computed in registers, which hold less
    tall, wide = power(rows), power(columns)
    if role == "segments":  # a scan has a program for each tile of columns, too
        tile = _default("scan", rows, columns, dtype, architecture, kind).columns
        return Entry(programs=max(PROGRAMS // 4, PROGRAMS // -(-columns // tile)))
    # 1. Loads of the next chunk are in flight if there are three stages: where shared memory holds them.
    stages = 3 if tall <= 128 and architecture not in SMALL else 2
    if role == "scan":
        if exact:
            return Entry(
                rows=tall, columns=min(16, wide), warps=8, stages=1 if {"computed", "gate"} <= set(kind) else 3
            )
        # 2. Four warps compute no pair twice, and leave room for a second program, but hold 64 rows at most.
        narrow = tall <= 64 and "computed" in kind and not {"gate", "split"} & set(kind)
        widest = 32 if "split" in kind or tall > 128 else 64
        return Entry(rows=tall, columns=min(widest, wide), warps=4 if narrow else 8, stages=stages)
    if role == "summary":
        if exact:
            return Entry(rows=min(32, tall), columns=min(32, wide), warps=4, stages=3)
        # 3. One program holds all of a state of 128 x 128, and reads keys and values once.
        side = 64 if architecture in SMALL else 128
        big = min(tall, wide) >= 128 and side == 128
        return Entry(rows=min(side, tall), columns=min(side, wide), warps=8 if big else 4, stages=3)
    if role == "fold":
        return Entry(columns=1024, warps=4, stages=4)
    if role == "within":
        return Entry(warps=1, stages=1)
    width = 16 if exact or rows <= 16 else 32
    return Entry(columns=width, warps=8 if role == "queries_backward" else 4, stages=1)


def power(width: int) -> int:
    """Return the power of two that holds a width, at least 16: the least side of a matrix product."""
    return max(16, 1 << (width - 1).bit_length())
