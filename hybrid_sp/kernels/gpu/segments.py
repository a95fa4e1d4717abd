"""The division of a rank's tokens among GPU programs: spans are cut into segments, and these into chunks.

A segment is a piece (`kernels/pieces.py`): tokens of one document in one span. Programs process segments in parallel.
Within a segment they go from chunk to chunk, with the state in registers. Chunks have C tokens, the last of a segment
perhaps fewer. A table in device memory has one row per segment, which also tells what happens to the state at its
start:

    start, stop   tokens [start, stop) of the rank
    chunk         index of its first chunk among all chunks of the rank
    span          the span it is part of
    flags         FIRST and LAST of its span; NEW: a document begins with it, so no state enters

All are exact in int32, since they count tokens of one rank. Kernels widen them before they compute addresses.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...transfer import to_device
from ..pieces import Pieces, Spans, cut
from . import tuning

SHORTEST = 4  # chunks: a segment's state in and out costs as much as about one chunk
COLUMNS = 5  # of the table
FIRST, LAST, NEW = 1, 2, 4


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of a rank, table [count, COLUMNS] int32 on the device of the call.

    chunk    C, tokens in a chunk
    chunks   tokens [start, stop) of each chunk of the rank, [N, 2] int32 on the device
    """

    pieces: Pieces
    table: Tensor
    chunk: int
    chunks: Tensor


@functools.lru_cache(maxsize=64)
def segment(
    spans: Spans, rows_per_token: int, chunk: int, device: torch.device, programs: int = tuning.PROGRAMS
) -> Segments:
    """Cut spans into segments, and these into chunks. `rows_per_token` is batch x heads."""
    return _tables(cut(spans, _size(sum(spans.lengths), rows_per_token, chunk, programs)), chunk, device)


@functools.lru_cache(maxsize=64)
def chain_of(count: int, device: torch.device) -> Segments:
    """Return `count` segments in one span without documents: for folds over something else than tokens."""
    return _tables(cut(Spans((count,)), 1), 1, device)


def _tables(pieces: Pieces, chunk: int, device: torch.device) -> Segments:
    rows: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    for p in pieces.all:
        flags = FIRST * p.begins_span | LAST * p.ends_span | NEW * p.begins_document
        rows.append((p.start, p.stop, len(chunks), p.span, flags))
        chunks += [(t, min(t + chunk, p.stop)) for t in range(p.start, p.stop, chunk)]
    table, of_chunks = (to_device(torch.tensor(numbers, dtype=torch.int32), device) for numbers in (rows, chunks))
    return Segments(pieces, table, chunk, of_chunks)


def _size(tokens: int, rows_per_token: int, chunk: int, programs: int) -> int:
    """Choose the tokens in a segment: a power of two of chunks, such that about so many programs share the work."""
    wanted = tokens * rows_per_token // (programs * chunk)
    return chunk * max(SHORTEST, 1 << max(wanted - 1, 0).bit_length())


@triton.jit
def places(tiles, BH):
    """Return the tile, the index of batch and head, and the segment of a program. Only the first dim of a grid is long
    enough for all three."""
    i = tl.program_id(0).to(tl.int64)
    return (i % tiles).to(tl.int32), i // tiles % BH, i // tiles // BH
