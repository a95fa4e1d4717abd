"""The tiles of an attention mask: rectangles and triangles that a fused kernel handles without a mask tensor.

A tile is a run of queries over a run of keys. A query sees all of the keys (`full`), the keys not later than its place
(`causal`), or the keys not earlier (`flipped`). A flipped tile is a causal square when both runs are read backwards.
Tiles over disjoint keys are merged by their log-sum-exp. A window of W tokens is cut into blocks of W queries. Each
block sees its own causal square and a flipped triangle of the W-1 keys before it:

    queries        keys of the block before | own keys
    0              . x x x                  | x . . .
    1              . . x x                  | x x . .        W = 4
    2              . . . x                  | x x x .
    3              . . . .                  | x x x x

All whole blocks of a run are one call of the kernel, as a batch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tile(NamedTuple):
    """The queries [first, first + queries) over keys [key, key + keys). The tile repeats every `stride` tokens,
    `repeats` times in all. If `fresh`, these queries have not seen any keys before."""

    kind: str
    first: int
    queries: int
    key: int
    keys: int
    fresh: bool = False
    repeats: int = 1
    stride: int = 0

    def of_queries(self, x: Tensor) -> Tensor:
        """View the queries' rows of x [B,T,...] as [B,repeats,queries,...]."""
        return _runs(x, self.first, self.queries, self.repeats, self.stride)

    def of_keys(self, x: Tensor) -> Tensor:
        """View the keys' rows of x [B,S,...] as [B,repeats,keys,...]."""
        return _runs(x, self.key, self.keys, self.repeats, self.stride)


def own(first: int, tokens: int, window: int | None) -> list[Tile]:
    """List the tiles for causal attention of a run of tokens to itself."""
    size = tokens if window is None else min(window, tokens)
    blocks, rest = divmod(tokens, size)
    last = first + blocks * size
    tiles = [Tile("causal", first, size, first, size, True, blocks, size)]
    if rest:
        tiles.append(Tile("causal", last, rest, last, rest, True))
    if blocks > 1:
        tiles += earlier(first + size, size, first + 1, size - 1, size, blocks - 1)
    if rest:
        tiles += earlier(last, rest, last - size + 1, size - 1, size)
    return tiles


def earlier(first: int, queries: int, key: int, keys: int, window: int | None, repeats: int = 1) -> list[Tile]:
    """List the tiles for attention of a run of queries to the `keys` tokens just before it, fewer than the window. The
    tiles repeat every window, `repeats` times in all."""
    everything = queries if window is None else min(queries, window - 1 - keys)
    side = min(queries - everything, keys)  # of the triangle, whose keys leave the window one by one
    runs = [
        ("full", first, everything, key, keys),
        ("flipped", first + everything, side, key, side),
        ("full", first + everything, side, key + side, keys - side),
    ]
    stride = 0 if window is None else window
    return [Tile(*run, repeats=repeats, stride=stride) for run in runs if run[2] and run[4]]


def _runs(x: Tensor, first: int, length: int, repeats: int, stride: int) -> Tensor:
    if repeats == 1:
        return x[:, None, first : first + length]
    return x[:, first : first + (repeats - 1) * stride + length].unfold(1, length, stride).movedim(-1, 2)
