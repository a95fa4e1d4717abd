"""The keys that a rank's queries see under a mask, and their owners: causal or not, a window, packed documents.

A mask is a list of tiles (`kernels/softmax/tiles.py`). Some lie over this rank's own keys, and are computed while the
keys of other ranks travel. The rest lie over keys of other ranks, numbered by their place in the result of the exchange
of keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..kernels.softmax import tiles
from ..kernels.softmax.tiles import Tile
from ..shard import Held, Shard, held
from .fetch import FetchPlan, Range, rows_of_others
from .kv import AllGatherKV, FetchKV, KVExchange


class Reading(NamedTuple):
    """The ranges of the sequence that queries [first, first + queries) of a rank see on other ranks. `start` is the
    place of the first query in the sequence."""

    first: int
    queries: int
    start: int
    ranges: list[Range]


class Mask(NamedTuple):
    """The tiles over this rank's own keys, the tiles over the keys that it receives, and the exchange `keys`."""

    own: list[Tile]
    rest: list[Tile]
    keys: KVExchange


def plan_mask(shard: Shard, causal: bool, window: int | None, own_keys: int) -> Mask:
    """Plan the mask of this rank's queries: tiles over its `own_keys` tokens and over the tokens that it receives."""
    everybody = [readings(shard, rank, causal, window) for rank in range(shard.sp.size)]
    wanted = [[read for reading in here for read in reading.ranges] for here in everybody]
    keys: KVExchange = AllGatherKV(shard) if _somebody_needs_all(shard, wanted) else FetchKV(FetchPlan(shard, wanted))
    here = everybody[shard.sp.rank]
    reads = [(reading, first, end) for reading in here for first, end in reading.ranges]
    rest = []
    for (reading, first, end), place in zip(reads, keys.places(wanted[shard.sp.rank]), strict=True):
        rest += _before(reading, place, end - first, reading.start - end, window)
    return Mask(own_tiles(shard, causal, window, own_keys), rest, keys)


def readings(shard: Shard, rank: int, causal: bool, window: int | None) -> list[Reading]:
    """Return the ranges that a rank's queries see on other ranks; `own_tiles` has what they see on their own."""
    own = shard.spans_at(rank)
    found = _earlier(shard, rank, window) if causal else _documents(shard, rank)
    return [reading._replace(ranges=[part for seen in reading.ranges for part in _cut(seen, own)]) for reading in found]


def own_tiles(shard: Shard, causal: bool, window: int | None, own_keys: int) -> list[Tile]:
    """Return the tiles of this rank's queries over its own keys: first each run over itself, then spans over earlier
    ones. Each query is fresh in exactly one of the first."""
    if causal:
        bounds = {0, *itertools.accumulate(shard.span_lengths), *shard.local_boundaries}
        found = [tile for a, b in itertools.pairwise(sorted(bounds)) for tile in tiles.own(a, b - a, window)]
        for reading in _earlier(shard, shard.sp.rank, window):
            for piece, between in _pieces(shard, reading):
                if piece.rank == shard.sp.rank:
                    found += _before(reading, piece.first, piece.tokens, between, window)
        return found
    runs = _documents(shard, shard.sp.rank)
    own = [Tile("full", r.first, r.queries, r.first, r.queries, fresh=True) for r in runs]
    return own if shard.boundaries else [own[0]._replace(keys=own_keys)]


def tiles_by_rank(shard: Shard, causal: bool, window: int | None) -> list[list[Tile]]:
    """Return the tiles of this rank's queries over every rank's keys, numbered as they lie on their rank."""
    found: list[list[Tile]] = [[] for _ in range(shard.sp.size)]
    found[shard.sp.rank] = own_tiles(shard, causal, window, shard.tokens)
    for reading in readings(shard, shard.sp.rank, causal, window):
        for piece, between in _pieces(shard, reading):
            found[piece.rank] += _before(reading, piece.first, piece.tokens, between, window)
    return found


def _before(reading: Reading, key: int, keys: int, between: int, window: int | None) -> list[Tile]:
    """Return the tiles of these queries over `keys` tokens that lie `between` tokens before them."""
    left = None if window is None else window - between  # what the tokens between leave of the window
    return tiles.earlier(reading.first, reading.queries, key, keys, left)


def _pieces(shard: Shard, reading: Reading) -> Iterator[tuple[Held, int]]:
    """Yield the pieces of the ranges that are read, and the number of tokens between each and the queries."""
    for first, end in reading.ranges:
        for piece in held(shard, first, end):
            first += piece.tokens
            yield piece, reading.start - first


def _cut(seen: Range, own: Iterable[Range]) -> list[Range]:
    """Return the parts of a range that lie outside the spans of a rank."""
    first, end = seen
    inside = [edge for a, b in own if a < end and first < b for edge in (max(a, first), min(b, end))]
    edges = [first, *inside, end]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _earlier(shard: Shard, rank: int, window: int | None) -> Iterator[Reading]:
    """Yield the causal readings: the first document of each span reads its tokens before the span, own ones too."""
    place = 0
    for start, end in shard.spans_at(rank):
        first = shard.document_start(start)
        if window is not None:
            first = max(first, start - window + 1)
        queries = min(end, shard.document_end(start)) - start
        yield Reading(place, queries, start, [(first, start)])
        place += end - start


def _documents(shard: Shard, rank: int) -> Iterator[Reading]:
    """Yield the readings without a causal mask: each document on a rank reads all of its tokens, own ones too.

    A rank's tokens of one document lie one after the other.
    """
    place = 0
    runs: dict[int, tuple[int, int]] = {}
    for start, end in shard.spans_at(rank):
        while start < end:
            stop = min(end, shard.document_end(start))
            first, tokens = runs.get(shard.document_start(start), (place, 0))
            runs[shard.document_start(start)] = first, tokens + stop - start
            place, start = place + stop - start, stop
    for start, (first, tokens) in runs.items():
        yield Reading(first, tokens, start, [(start, shard.document_end(start))])


def _somebody_needs_all(shard: Shard, wanted: list[list[Range]]) -> bool:
    """Tell whether some rank would receive as many tokens as by the gather, or more: then the gather serves all."""
    missing = [shard.length - sum(end - start for start, end in shard.spans_at(rank)) for rank in range(len(wanted))]
    return any(0 < missing[rank] <= rows_of_others(shard, rank, ranges) for rank, ranges in enumerate(wanted))
