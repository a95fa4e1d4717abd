"""The keys that a rank's queries see under a mask, and their owners: causal or not, a window, packed documents.

A mask is a list of tiles (`kernels/softmax/tiles.py`). Some lie over this rank's own keys. Others lie over keys of
other ranks, numbered by their place in the result of the exchange of keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ..kernels.softmax import tiles
from ..kernels.softmax.tiles import Tile
from ..shard import Shard, held
from .fetch import FetchPlan, Range, rows_of_others
from .kv import AllGatherKV, FetchKV, KVExchange


class Reading(NamedTuple):
    """The ranges of the sequence that queries [first, first + queries) of a rank see outside their own run."""

    first: int
    queries: int
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
    reads = [(reading, end - first) for reading in here for first, end in reading.ranges]
    rest = []
    for (reading, tokens), place in zip(reads, keys.places(wanted[shard.sp.rank]), strict=True):
        rest += tiles.earlier(reading.first, reading.queries, place, tokens, window)
    return Mask(own_tiles(shard, causal, window, own_keys), rest, keys)


def readings(shard: Shard, rank: int, causal: bool, window: int | None) -> list[Reading]:
    """Return the ranges that a rank's queries see outside their own runs; `own_tiles` has the runs."""
    return list(_earlier(shard, rank, window) if causal else _documents(shard, rank))


def own_tiles(shard: Shard, causal: bool, window: int | None, own_keys: int) -> list[Tile]:
    """Return the tiles of each run of this rank's queries over itself. Each query is fresh in exactly one of them."""
    if causal:
        bounds = {0, *itertools.accumulate(shard.span_lengths), *shard.local_boundaries}
        return [tile for a, b in itertools.pairwise(sorted(bounds)) for tile in tiles.own(a, b - a, window)]
    runs = readings(shard, shard.sp.rank, causal, window)
    own = [Tile("full", r.first, r.queries, r.first, r.queries, fresh=True) for r in runs]
    return own if shard.boundaries else [own[0]._replace(keys=own_keys)]


def tiles_by_rank(shard: Shard, causal: bool, window: int | None) -> list[list[Tile]]:
    """Return the readings of this rank as one list of tiles for each rank that holds the keys.

    Keys are numbered as they lie on their rank. This rank's own list has the spans that see each other.
    """
    found: list[list[Tile]] = [[] for _ in range(shard.sp.size)]
    for reading in readings(shard, shard.sp.rank, causal, window):
        for first, end in reading.ranges:
            for piece in held(shard, first, end):
                first += piece.tokens
                left = None if window is None else window - (end - first)  # what the tokens between leave of the window
                found[piece.rank] += tiles.earlier(reading.first, reading.queries, piece.first, piece.tokens, left)
    return found


def _earlier(shard: Shard, rank: int, window: int | None) -> Iterator[Reading]:
    """Yield the causal readings: the first document of each span reads its tokens before the span."""
    place = 0
    for start, end in shard.spans_at(rank):
        first = shard.document_start(start)
        if window is not None:
            first = max(first, start - window + 1)
        queries = min(end, shard.document_end(start)) - start
        yield Reading(place, queries, [(first, start)] if first < start else [])
        place += end - start


def _documents(shard: Shard, rank: int) -> Iterator[Reading]:
    """Yield the readings without a causal mask: each document on a rank reads its tokens on other ranks.

    A rank's tokens of one document lie one after the other.
    """
    spans, place = shard.spans_at(rank), 0
    runs: dict[int, tuple[int, int]] = {}
    for start, end in spans:
        while start < end:
            stop = min(end, shard.document_end(start))
            first, tokens = runs.get(shard.document_start(start), (place, 0))
            runs[shard.document_start(start)] = first, tokens + stop - start
            place, start = place + stop - start, stop
    for start, (first, tokens) in runs.items():
        end = shard.document_end(start)
        held_here = [edge for a, b in spans if a < end and start < b for edge in (max(a, start), min(b, end))]
        edges = [start, *held_here, end]
        yield Reading(first, tokens, [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b])


def _somebody_needs_all(shard: Shard, wanted: list[list[Range]]) -> bool:
    """Tell whether some rank would receive as many tokens as by the gather, or more: then the gather serves all."""
    missing = [shard.length - sum(end - start for start, end in shard.spans_at(rank)) for rank in range(len(wanted))]
    return any(0 < missing[rank] <= rows_of_others(shard, rank, ranges) for rank, ranges in enumerate(wanted))
