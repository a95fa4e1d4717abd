"""The parts of a mask: together they are every pair of a query and a key that it lets through, once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import groups
from hybrid_sp.exchange.visible import tiles_by_rank
from hybrid_sp.kernels.softmax.tiles import Tile
from tests.hybrid_sp.cases import LENGTH, LONG_DOCUMENTS, SHORT_DOCUMENTS

MASKS = [(True, None), (False, None), (True, 1), (True, 2), (True, 16), (True, 50), (True, 200)]
DOCUMENTS = (None, SHORT_DOCUMENTS, LONG_DOCUMENTS)


def visible(causal: bool, window: int | None, documents: tuple[int, ...] | None) -> Tensor:
    """How often each token sees each, [L, L]: the definition."""
    t = torch.arange(LENGTH)
    bounds = torch.tensor((documents or (0, LENGTH))[1:])
    document = torch.searchsorted(bounds, t, right=True)
    seen = document[:, None] == document
    if causal:
        seen &= t <= t[:, None]
    if window is not None:
        seen &= t > t[:, None] - window
    return seen.int()


def pairs(part: Tile) -> Tensor:
    """Pairs of a query and a key, as they are numbered in the part, [pairs, 2]."""
    i, j = torch.arange(part.queries)[:, None], torch.arange(part.keys)
    seen = {"full": i >= 0, "causal": j <= i, "flipped": j >= i}[part.kind].expand(part.queries, part.keys).nonzero()
    steps = part.stride * torch.arange(part.repeats)[:, None, None]
    return (seen + torch.tensor([part.first, part.key]) + steps).flatten(0, 1)


def check_parts(sp: hsp.SequenceParallel, rank: int) -> None:
    for (causal, window), documents in itertools.product(MASKS, DOCUMENTS):
        shard = sp.shard(LENGTH, documents)
        tokens = [torch.cat([torch.arange(*span) for span in shard.spans_at(r)]) for r in range(sp.size)]
        mine = tokens[rank]
        todo = tiles_by_rank(shard, causal, window)
        want = visible(causal, window, documents)[mine]
        got = torch.zeros_like(want)
        for keys, parts in zip(tokens, todo, strict=True):
            for part in parts:
                i, j = pairs(part).unbind(1)
                got.index_put_((i, keys[j]), torch.ones_like(i, dtype=got.dtype), accumulate=True)
        where = f"{causal=} {window=} {documents} on rank {rank}"
        assert torch.equal(got, want), where
        fresh = torch.cat([pairs(part)[:, 0].unique() for part in todo[rank] if part.fresh])
        assert torch.equal(fresh.sort().values, torch.arange(len(mine))), where


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_parts_over_the_keys_of_each_rank_are_the_mask(
    layout: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank communicates, so this process is each of them in turn."""
    for rank in range(world):
        monkeypatch.setattr(groups, "rank", lambda _, rank=rank: rank)
        monkeypatch.setattr(groups, "size", lambda _: world)
        check_parts(hsp.SequenceParallel(None, layout=layout, check=False), rank)
