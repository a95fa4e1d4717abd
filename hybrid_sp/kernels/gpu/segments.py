"""How GPU programs share a rank's tokens: spans, cut into segments, which a program works through chunk by chunk.

A segment is a run of consecutive tokens of one document in one span. Programs take segments in parallel; within one
they go from chunk to chunk, with the state in registers. Chunks have C tokens, the last of a segment perhaps fewer.
What a state does at the start of a segment is said once, in the segment's row of a table in device memory:

    start, stop   tokens [start, stop) of the rank
    chunk         index of its first chunk among all chunks of the rank
    span          the span it is part of
    flags         FIRST and LAST of its span; NEW: a document begins with it, so that no state enters

All are exact in int32, since they count tokens of one rank; kernels widen them before they make addresses.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # segments x batch x heads that are enough to fill a device
SHORTEST = 4  # chunks: a segment's state in and out costs as much as about one chunk
COLUMNS = 5  # of the table
FIRST, LAST, NEW = 1, 2, 4


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of a rank, table [count, COLUMNS] int32 on the device of the call.

    chunk    C, tokens in a chunk
    chunks   tokens [start, stop) of each chunk of the rank, [N, 2] int32 on the device
    bounds   first segment of each span, and the number of segments
    cut_off  the segments that a state which enters their span does not reach, as a document has begun since;
             bool [count] on the device, None where there are none
    open     per span: no document begins in it, so that the state which enters it reaches its end
    """

    table: Tensor
    chunk: int
    chunks: Tensor
    bounds: tuple[int, ...]
    cut_off: Tensor | None
    open: tuple[bool, ...]

    @property
    def count(self) -> int:
        return self.bounds[-1]

    @property
    def spans(self) -> int:
        return len(self.open)

    def of_span(self, span: int) -> slice:
        """Indices of the segments of one span."""
        return slice(self.bounds[span], self.bounds[span + 1])


@functools.lru_cache(maxsize=64)
def segment(
    lengths: tuple[int, ...], rows_per_token: int, boundaries: tuple[int, ...], chunk: int, device: torch.device
) -> Segments:
    """Cut spans of these lengths (tokens) into segments, and at `boundaries`, the tokens of the rank at which documents
    begin. `rows_per_token` is batch x heads."""
    size = _size(sum(lengths), rows_per_token, chunk)
    rows: list[tuple[int, ...]] = []
    cut_off: list[bool] = []
    bounds, whole = [0], []
    chunks: list[tuple[int, int]] = []
    ends = list(itertools.accumulate(lengths))
    for span, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        begins = {t for t in boundaries if a <= t < b}
        edges = sorted({a, *begins, b})
        begun = False
        for start, stop in itertools.pairwise(edges):
            begun = begun or start in begins
            for t in range(start, stop, size):
                end = min(t + size, stop)
                flags = FIRST * (t == a) | LAST * (end == b) | NEW * (t in begins)
                rows.append((t, end, len(chunks), span, flags))
                cut_off.append(begun)
                chunks += [(first, min(first + chunk, end)) for first in range(t, end, chunk)]
        bounds.append(len(rows))
        whole.append(not begins)
    table, of_chunks = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (rows, chunks))
    unreached = torch.tensor(cut_off, device=device) if any(cut_off) else None
    return Segments(table, chunk, of_chunks, tuple(bounds), unreached, tuple(whole))


def _size(tokens: int, rows_per_token: int, chunk: int) -> int:
    """Tokens in a segment: a power of two of chunks, so many that about PROGRAMS programs share the work."""
    wanted = tokens * rows_per_token // (PROGRAMS * chunk)
    return chunk * max(SHORTEST, 1 << max(wanted - 1, 0).bit_length())


@triton.jit
def places(tiles, BH):
    """Tile, batch and head, and segment of a program. Only the first dim of a grid is long enough for them all."""
    i = tl.program_id(0).to(tl.int64)
    return (i % tiles).to(tl.int32), i // tiles % BH, i // tiles // BH
