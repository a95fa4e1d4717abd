"""The walk of a kernel over the tokens of a rank: spans are cut into chunks and processed a few chunks at a time.

A chunk is a piece (`kernels/pieces.py`) of at most CHUNK tokens, padded with zeros. Zeros neither add to a state nor
decay it. A document therefore begins only where a chunk begins: within chunks there is nothing to mask, and between
chunks the chain of states is cut. Chunks are processed in blocks, so temporaries stay in the cache however long the
sequence is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ...transfer import to_device
from ..pieces import Piece, Pieces, Spans, cut

CHUNK = 64  # tokens, a power of two; half as many where keys and values are at most half as wide
BLOCK_ROWS = 2048  # rows (batch x heads x tokens) that one block of chunks may hold


@dataclass(frozen=True, eq=False)
class Block:
    """The consecutive chunks of one span: tokens [start, stop) of the rank, chunks [first, first + count) of the rank.

    If chunks before the last one are padded, `rows` gives the token of each row of the block, or one past the last
    token for padding. `places` then gives the row of each token.
    """

    span: int
    start: int
    stop: int
    chunk: int
    first: int
    pieces: tuple[Piece, ...]
    rows: Tensor | None = None
    places: Tensor | None = None

    @cached_property
    def count(self) -> int:
        return len(self.pieces)

    @cached_property
    def chunks(self) -> slice:
        """The indices of this block's chunks among all chunks of the rank."""
        return slice(self.first, self.first + self.count)

    @cached_property
    def begins_span(self) -> bool:
        return self.pieces[0].begins_span

    @cached_property
    def ends_span(self) -> bool:
        return self.pieces[-1].ends_span

    @cached_property
    def padding(self) -> int:
        return self.count * self.chunk - (self.stop - self.start)

    def load(self, x_BTHD: Tensor, heads: int) -> Tensor:
        """Return the tokens of this block as [(N B H), C, D] with N chunks. Key heads are repeated up to `heads`. The
        result may be a view: do not write to it."""
        x = x_BTHD.narrow(1, self.start, self.stop - self.start)
        if self.rows is not None:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1)).index_select(1, self.rows)
        elif self.padding:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.padding))
        batch, _, groups, *width = x.shape
        x = self._by_chunk(x)
        if groups < heads:
            x = x.unsqueeze(3).expand(self.count, batch, groups, heads // groups, self.chunk, *width)
        return x.reshape(-1, self.chunk, *width)

    def store(self, out_BTHD: Tensor, x: Tensor) -> None:
        """Write [(N B H), C, D] to its tokens, summed over the heads that share a key head."""
        place, x = self._place(out_BTHD, x)
        place.copy_(x)

    def add(self, out_BTHD: Tensor, x: Tensor) -> None:
        """Add [(N B H), C, D] to its tokens, summed over the heads that share a key head."""
        place, x = self._place(out_BTHD, x)
        place.add_(x)

    def _place(self, out_BTHD: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part of `out` that this block's tokens take, and x in its shape."""
        batch, _, groups, *width = out_BTHD.shape
        heads = len(x) // (self.count * batch)
        x = x.view(self.count, batch, heads, self.chunk, *width)
        if groups < heads:
            x = x.unflatten(2, (groups, -1)).sum(3)
        place = out_BTHD.narrow(1, self.start, self.stop - self.start)
        if not self.padding:
            return self._by_chunk(place), x
        x = x.transpose(2, 3).transpose(0, 1).flatten(1, 2)  # [B, N C, G, D]
        return place, x[:, : place.shape[1]] if self.places is None else x.index_select(1, self.places)

    def _by_chunk(self, x: Tensor) -> Tensor:
        """View [B, N C, G, D] as [N, B, G, C, D]."""
        x = x.view(x.shape[0], self.count, self.chunk, *x.shape[2:])
        return x.permute(1, 0, 3, 2, 4) if x.ndim == 5 else x.permute(1, 0, 3, 2)


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of a rank's spans, grouped in blocks that are processed one at a time."""

    pieces: Pieces
    blocks: tuple[Block, ...]


def chunks_of(spans: Spans, v_BTHV: Tensor, key_width: int) -> Chunks:
    """Cut spans into chunks, and group these in blocks for the batch and heads of v."""
    batch, _, heads, width = v_BTHV.shape
    chunk = CHUNK if max(key_width, width) > CHUNK // 2 else CHUNK // 2
    return _chunks(spans, batch * heads, chunk, BLOCK_ROWS, v_BTHV.device)


@functools.lru_cache(maxsize=64)
def _chunks(spans: Spans, rows_per_token: int, chunk: int, block_rows: int, device: torch.device) -> Chunks:
    longest = max(piece.stop - piece.start for piece in cut(spans).all)
    size = min(chunk, 1 << (longest - 1).bit_length())
    pieces, per_block = cut(spans, size), max(1, block_rows // (rows_per_token * size))
    blocks = [
        _block(span, size, first, pieces.all[first : min(first + per_block, end)], device)
        for span, (start, end) in enumerate(itertools.pairwise(pieces.bounds))
        for first in range(start, end, per_block)
    ]
    return Chunks(pieces, tuple(blocks))


def _block(span: int, size: int, first: int, chunks: Sequence[Piece], device: torch.device) -> Block:
    start, stop = chunks[0].start, chunks[-1].stop
    rows = places = None
    if any(chunk.stop - chunk.start < size for chunk in chunks[:-1]):
        rows = torch.full((len(chunks), size), stop - start)
        for n, chunk in enumerate(chunks):
            rows[n, : chunk.stop - chunk.start] = torch.arange(chunk.start - start, chunk.stop - start)
        rows = rows.flatten()
        places = (rows < stop - start).nonzero().squeeze(1)
        rows, places = to_device(rows, device), to_device(places, device)
    return Block(span, start, stop, size, first, tuple(chunks), rows, places)


@functools.lru_cache(maxsize=32)
def triangle(size: int, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    ones = torch.ones(size, size, dtype=dtype, device=device)
    return {
        "through": ones.tril(),
        "before": ones.tril(-1),
        "from": ones.triu(),
        "after": ones.triu(1),
    }[kind]


def running_sum(x: Tensor, kind: str) -> Tensor:
    """Sum along the tokens of a chunk, x [N, C, K]: `through` t (s <= t), `before` (s < t), `from` (s >= t)
    or `after` (s > t). It is a product with a triangle of ones, never the difference of two sums. A large decay at one
    token therefore costs the others no precision."""
    ones = triangle(x.shape[1], kind, x.dtype, x.device)
    return (x.squeeze(-1) @ ones.T).unsqueeze(-1) if x.shape[2] == 1 else ones @ x
