"""Which keys a rank's queries see under a mask, and who holds them: causal or not, a window, packed documents.

A mask is a list of tiles (`kernels/softmax/tiles.py`): those over this rank's own keys, and those over keys of other
ranks, numbered as they lie in what an exchange of keys receives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ..kernels.softmax import tiles
from ..kernels.softmax.tiles import Tile
from ..shard import Shard
from .fetch import FetchPlan, Range, held, rows_of_others
from .kv import AllGatherKV, FetchKV, KVExchange


class Reading(NamedTuple):
    """Queries [first, first + queries) of a rank see these ranges of the sequence, besides their own run."""

    first: int
    queries: int
    ranges: list[Range]


class Mask(NamedTuple):
    """What this rank computes with its own keys, and with those that it receives by `keys`."""

    own: list[Tile]
    rest: list[Tile]
    keys: KVExchange


def plan_mask(shard: Shard, causal: bool, window: int | None, own_keys: int) -> Mask:
    """The mask of this rank's queries over its `own_keys` tokens and over what it receives."""
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
    """What a rank's queries see besides their own runs, which `own_tiles` has."""
    return list(_earlier(shard, rank, window) if causal else _documents(shard, rank))


def own_tiles(shard: Shard, causal: bool, window: int | None, own_keys: int) -> list[Tile]:
    """Each run of this rank's queries over itself: in these tiles every query is fresh, once."""
    if causal:
        bounds = {0, *itertools.accumulate(shard.span_lengths), *shard.local_boundaries}
        return [tile for a, b in itertools.pairwise(sorted(bounds)) for tile in tiles.own(a, b - a, window)]
    runs = readings(shard, shard.sp.rank, causal, window)
    own = [Tile("full", r.first, r.queries, r.first, r.queries, fresh=True) for r in runs]
    return own if shard.boundaries else [own[0]._replace(keys=own_keys)]


def tiles_by_rank(shard: Shard, causal: bool, window: int | None) -> list[list[Tile]]:
    """The readings of this rank as tiles over the tokens of each rank that holds them, numbered as they lie there; its
    own row are its spans that see each other."""
    found: list[list[Tile]] = [[] for _ in range(shard.sp.size)]
    for reading in readings(shard, shard.sp.rank, causal, window):
        for first, end in reading.ranges:
            for piece in held(shard, first, end):
                first += piece.tokens
                left = None if window is None else window - (end - first)  # of the window, after the tokens between
                found[piece.rank] += tiles.earlier(reading.first, reading.queries, piece.first, piece.tokens, left)
    return found


def _earlier(shard: Shard, rank: int, window: int | None) -> Iterator[Reading]:
    """Causal: the first document of each span, and what lies before it."""
    place = 0
    for start, end in shard.spans_at(rank):
        first = shard.document_start(start)
        if window is not None:
            first = max(first, start - window + 1)
        queries = min(end, shard.document_end(start)) - start
        yield Reading(place, queries, [(first, start)] if first < start else [])
        place += end - start


def _documents(shard: Shard, rank: int) -> Iterator[Reading]:
    """Without a mask: each document that a rank has tokens of, which lie one after the other, and its other tokens."""
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
    """Whether some rank would receive as many tokens as in the gather, or more: then the gather serves all."""
    for rank, ranges in enumerate(wanted):
        missing = shard.length - sum(end - start for start, end in shard.spans_at(rank))
        if 0 < missing <= rows_of_others(shard, rank, ranges):
            return True
    return False
