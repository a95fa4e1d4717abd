"""How a kernel walks over the tokens of a rank: spans, cut into chunks, taken a few chunks at a time.

A span is a run of consecutive tokens; a chunk is CHUNK tokens of one span (the last one may be shorter and is padded
with zeros, which neither add to a state nor decay it). Chunks are processed in blocks, so that temporaries stay in the
cache however long the sequence is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

CHUNK = 64  # tokens; a power of two
BLOCK_ROWS = 8192  # rows (batch x heads x tokens) that one block of chunks may hold


@dataclass(frozen=True)
class Block:
    """Consecutive chunks of one span. `slot` is where its first entering state lies (see `Chunks.slots`)."""

    span: int
    start: int
    stop: int
    chunk: int
    slot: int
    first: int
    count: int

    @property
    def states(self) -> slice:
        """Slots of the states that enter this block's chunks."""
        return slice(self.slot, self.slot + self.count)

    @property
    def chunks(self) -> slice:
        """Indices of this block's chunks among all chunks of the rank."""
        return slice(self.first, self.first + self.count)

    def load(self, x_BTHD: Tensor, heads: int) -> Tensor:
        """Tokens of this block as [(N B H), C, D] with N chunks; key heads are repeated up to `heads`. May be a view:
        not to be written to."""
        x = x_BTHD[:, self.start : self.stop]
        short = self.count * self.chunk - (self.stop - self.start)
        if short:
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
        return x[:, : self.stop - self.start]


@dataclass(frozen=True)
class Chunks:
    """The chunks of a rank's spans.

    slots   number of states kept: one before every chunk and one after the last chunk of every span
    leaving slot of the state after the last chunk of each span
    bounds  first chunk of each span, and the number of chunks at the end
    """

    blocks: tuple[Block, ...]
    slots: int
    leaving: tuple[int, ...]
    bounds: tuple[int, ...]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __reversed__(self) -> Iterator[Block]:
        return reversed(self.blocks)

    @property
    def count(self) -> int:
        return self.bounds[-1]

    def of_span(self, span: int) -> slice:
        """Indices of the chunks of one span."""
        return slice(self.bounds[span], self.bounds[span + 1])


def cut(lengths: Sequence[int], rows_per_token: int) -> Chunks:
    """Cut spans of these lengths (tokens) into chunks; `rows_per_token` is batch x heads."""
    size = min(CHUNK, 1 << (max(lengths) - 1).bit_length())
    per_block = max(1, BLOCK_ROWS // (rows_per_token * size))
    blocks, leaving, bounds, token = [], [], [0], 0
    for span, length in enumerate(lengths):
        count = -(-length // size)
        for n in range(0, count, per_block):
            here = min(per_block, count - n)
            start, stop = token + n * size, token + min(length, (n + here) * size)
            blocks.append(Block(span, start, stop, size, bounds[span] + span + n, bounds[span] + n, here))
        token += length
        bounds.append(bounds[span] + count)
        leaving.append(bounds[span + 1] + span)
    return Chunks(tuple(blocks), bounds[-1] + len(lengths), tuple(leaving), tuple(bounds))


@functools.lru_cache(maxsize=32)
def _triangle(size: int, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    ones = torch.ones(size, size, dtype=dtype, device=device)
    return {
        "through": ones.tril(),
        "before": ones.tril(-1),
        "from": ones.triu(),
        "after": ones.triu(1),
        "mask": torch.zeros_like(ones).masked_fill_(ones.triu(1).bool(), float("-inf")),
    }[kind]


def running_sum(x: Tensor, kind: str) -> Tensor:
    """Sums along the tokens of a chunk, x [N, C] or [N, C, K]: `through` t (s <= t), `before` (s < t), `from` (s >= t)
    or `after` (s > t). A product with a triangle of ones: no sum is ever taken as the difference of two others, so a
    large decay at one token costs the others no precision."""
    triangle = _triangle(x.shape[1], kind, x.dtype, x.device)
    return x @ triangle.T if x.ndim == 2 else triangle @ x


def between(g_NC: Tensor) -> Tensor:
    """sums[n, t, s] = g[n, s+1] + ... + g[n, t] for s <= t, and -inf for s > t.

    Running sums are kept in two parts, together as exact as fp64, so that their differences are exact in the dtype of g
    also beside a decay of -1e4.
    """
    exact = g_NC.double().cumsum(1)
    high = exact.to(g_NC.dtype)
    low = (exact - high).to(g_NC.dtype)
    sums = (high[:, :, None] - high[:, None, :]).add_(low[:, :, None]).sub_(low[:, None, :])
    return sums.add_(_triangle(g_NC.shape[1], "mask", g_NC.dtype, g_NC.device))
