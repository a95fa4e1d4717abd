"""What the cost model says that a mixer sends is what the ledger counts, on every rank."""

from __future__ import annotations

import pytest
import torch

import hybrid_sp as hsp
from analysis.traffic import Setting, volume
from hybrid_sp.collectives import Group
from hybrid_sp.layout import LAYOUTS
from layers.registry import MIXERS, Place, mixer_spec
from tests.support.ranks import run_ranks

PLACE = Place(dim=16, heads=4, kv_heads=2, layer=1, depth=4, norm_eps=1e-6, rope_base=100.0)
OPTIONS = {"sliding_window": {"window": 5}}  # fits into a span
LENGTH = 48


def count(group: Group, layout: str) -> dict[str, tuple[int, int]]:
    """Bytes that this rank receives forward and backward for one layer of each mixer, two sequences at a time."""
    shard = hsp.SequenceParallel(group, layout=layout, check=True).shard(LENGTH)
    counted = {}
    for name in MIXERS:
        mixer = mixer_spec(name, **OPTIONS.get(name, {})).build(PLACE)
        x = torch.randn(2, shard.tokens, PLACE.dim, requires_grad=True)
        with hsp.ledger() as book:
            mixer(x, shard)[0].sum().backward()
        ways = ("forward", "backward")
        counted[name] = tuple(sum(row.bytes for row in book.select(direction=way)) for way in ways)
    return counted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("P", [1, 2, 3])
def test_every_mixer_sends_what_its_cost_says(P: int, layout: str) -> None:
    spans = LAYOUTS.index(layout) + 1
    cut = Setting(P=P, world=P, spans=spans, B=2, passes=1, L=LENGTH, kv_bytes=4)
    for rank, counted in enumerate(run_ranks(count, P, layout)):
        for name, bytes_ in counted.items():
            said = volume(mixer_spec(name, **OPTIONS.get(name, {})).cost(PLACE), cut, rank)
            assert bytes_ == (said.forward, said.backward), f"{name} on rank {rank} of {P}, {layout}"
