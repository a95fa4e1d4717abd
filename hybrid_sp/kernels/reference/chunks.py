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

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..pieces import Piece, Pieces, Spans, cut

CHUNK = 64  # tokens; a power of two
BLOCK_ROWS = 8192  # rows (batch x heads x tokens) that one block of chunks may hold


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
    count: int
    rows: Tensor | None = None
    places: Tensor | None = None

    @property
    def chunks(self) -> slice:
        """The indices of this block's chunks among all chunks of the rank."""
        return slice(self.first, self.first + self.count)

    def load(self, x_BTHD: Tensor, heads: int) -> Tensor:
        """Return the tokens of this block as [(N B H), C, D] with N chunks. Key heads are repeated up to `heads`. The
        result may be a view: do not write to it."""
        x = x_BTHD[:, self.start : self.stop]
        short = self.count * self.chunk - (self.stop - self.start)
        if self.rows is not None:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1)).index_select(1, self.rows.to(x.device))
        elif short:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, short))
        if x.ndim == 3:
            return rearrange(x, "B (N C) H -> (N B H) C", C=self.chunk)
        return repeat(x, "B (N C) G D -> (N B G R) C D", C=self.chunk, R=heads // x.shape[2])

    def store(self, out_BTHD: Tensor, x: Tensor) -> None:
        """Write [(N B H), C, D] to its tokens, summed over the heads that share a key head."""
        out_BTHD[:, self.start : self.stop] = self._to_tokens(x, out_BTHD)

    def add(self, out_BTHD: Tensor, x: Tensor) -> None:
        """Add [(N B H), C, D] to its tokens, summed over the heads that share a key head."""
        out_BTHD[:, self.start : self.stop] += self._to_tokens(x, out_BTHD)

    def _to_tokens(self, x: Tensor, out_BTHD: Tensor) -> Tensor:
        batch, _, groups = out_BTHD.shape[:3]
        if x.ndim == 2:
            x = rearrange(x, "(N B H) C -> B (N C) H", B=batch, H=groups)
        elif x.shape[0] == batch * groups * self.count:
            x = rearrange(x, "(N B G) C D -> B (N C) G D", B=batch, G=groups)
        else:
            x = rearrange(x, "(N B G R) C D -> B (N C) G R D", N=self.count, B=batch, G=groups).sum(3)
        return x[:, : self.stop - self.start] if self.places is None else x.index_select(1, self.places.to(x.device))


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of a rank's spans, grouped in blocks that are processed one at a time."""

    pieces: Pieces
    blocks: tuple[Block, ...]

    def ends_span(self, block: Block) -> bool:
        """Tell whether the block's last chunk is the last one of its span."""
        return block.first + block.count == self.pieces.bounds[block.span + 1]

    def after(self, n: int, span: int, h: Tensor, leaving: Tensor) -> Tensor | None:
        """Select the tensor that receives the state after chunk n. It is the next chunk's entering state, or the state
        that leaves the span, or None because a document ends."""
        if n + 1 == self.pieces.bounds[span + 1]:
            return leaving[span]
        return None if self.pieces.all[n + 1].fresh else h[n + 1]


def chunks_of(spans: Spans, v_BTHV: Tensor) -> Chunks:
    """Cut spans into chunks, and group these in blocks for the batch and heads of v."""
    return _chunks(spans, v_BTHV.shape[0] * v_BTHV.shape[2], CHUNK, BLOCK_ROWS)


@functools.lru_cache(maxsize=64)
def _chunks(spans: Spans, rows_per_token: int, chunk: int, block_rows: int) -> Chunks:
    longest = max(piece.stop - piece.start for piece in cut(spans).all)
    size = min(chunk, 1 << (longest - 1).bit_length())
    pieces, per_block = cut(spans, size), max(1, block_rows // (rows_per_token * size))
    blocks = [
        _block(span, size, first, pieces.all[first : min(first + per_block, end)])
        for span, (start, end) in enumerate(itertools.pairwise(pieces.bounds))
        for first in range(start, end, per_block)
    ]
    return Chunks(pieces, tuple(blocks))


def _block(span: int, size: int, first: int, chunks: Sequence[Piece]) -> Block:
    start, stop = chunks[0].start, chunks[-1].stop
    rows = places = None
    if any(chunk.stop - chunk.start < size for chunk in chunks[:-1]):
        rows = torch.full((len(chunks), size), stop - start)
        for n, chunk in enumerate(chunks):
            rows[n, : chunk.stop - chunk.start] = torch.arange(chunk.start - start, chunk.stop - start)
        rows = rows.flatten()
        places = (rows < stop - start).nonzero().squeeze(1)
    return Block(span, start, stop, size, first, len(chunks), rows, places)


@functools.lru_cache(maxsize=32)
def triangle(size: int, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    ones = torch.ones(size, size, dtype=dtype, device=device)
    return {
        "through": ones.tril(),
        "before": ones.tril(-1),
        "from": ones.triu(),
        "after": ones.triu(1),
        "mask": torch.zeros_like(ones).masked_fill_(ones.triu(1).bool(), float("-inf")),
        "strict mask": torch.zeros_like(ones).masked_fill_(ones.triu().bool(), float("-inf")),
    }[kind]


def running_sum(x: Tensor, kind: str) -> Tensor:
    """Sum along the tokens of a chunk, x [N, C] or [N, C, K]: `through` t (s <= t), `before` (s < t), `from` (s >= t)
    or `after` (s > t). It is a product with a triangle of ones, never the difference of two sums. A large decay at one
    token therefore costs the others no precision."""
    ones = triangle(x.shape[1], kind, x.dtype, x.device)
    return x @ ones.T if x.ndim == 2 else ones @ x
