"""What the cost model says that a mixer sends is what the ledger counts, on every rank."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hybrid_sp as hsp
from analysis.traffic import Setting, exchange, volume
from hybrid_sp.comm.groups import Group
from hybrid_sp.comm.link import Link
from hybrid_sp.exchange import EXCHANGES
from hybrid_sp.shard import LAYOUTS
from layers.registry import MIXERS, BlockContext, MixerSpec, mixer_cost, mixer_spec
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

CONTEXT = BlockContext(dim=16, heads=4, kv_heads=2, layer=1, depth=4, norm_eps=1e-6, rope_base=100.0)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding_window": ("sliding_window", {"window": 5}),  # fits into a span
    "softmax of 2026": ("softmax", {"conv": 3, "gate": "channel", "sinks": True, "qk_norm": True, "head_dim": 6}),
    "linear with a convolution": ("linear", {"conv": 4}),
    "kda of 2026": ("kda", {"gate_lower_bound": -5.0, "full_rank": "both", "key_heads": 2, "conv": 0}),
    "heads of its own": ("gated_delta_net", {"heads": 2, "head_dim": 8}),
    "three writes": ("gated_delta_product", {"steps": 3, "key_heads": 2}),
}
EVERY = [*dict.fromkeys([*MIXERS, *VARIANTS])]
LENGTH = 48
LINK = Link(latency=1e-6, bandwidth=1e9)  # on which "auto" finds different exchanges for different mixers


def spec_of(name: str) -> MixerSpec:
    mixer, options = VARIANTS.get(name, (name, {}))
    return mixer_spec(mixer, **options)


def count(
    group: Group,
    layout: str,
    link: Link,
    names: list[str],
    dtype: torch.dtype = torch.float32,
    again: bool = False,
    **strategies: Any,
) -> dict[str, tuple[int, int]]:
    """Bytes that this rank receives forward and backward for one layer of each mixer, two sequences at a time; `again`:
    checkpointed."""
    shard = hsp.SequenceParallel(group, layout=layout, link=link, check="calls", **strategies).shard(LENGTH)
    counted = {}
    for name in names:
        mixer = spec_of(name).build(CONTEXT).to(dtype)
        x = torch.randn(2, shard.tokens, CONTEXT.dim, dtype=dtype, requires_grad=True)
        with hsp.ledger() as book:
            if again:
                y, _ = checkpoint(mixer, x, shard, use_reentrant=False, context_fn=hsp.checkpoint_contexts)
            else:
                y, _ = mixer(x, shard)
            y.sum().backward()
        ways = ("forward", "backward")
        counted[name] = tuple(sum(row.bytes for row in book.select(direction=way)) for way in ways)
    return counted


LINEAR = [*EXCHANGES, "auto"]
FEW = [(3, "zigzag", "all_gather"), (3, "zigzag", "doubling"), (2, "contiguous", "auto")]
MANY = [one for one in itertools.product((1, 2, 3), LAYOUTS, LINEAR) if one not in FEW]


@pytest.mark.parametrize(("P", "layout", "linear"), tiered(FEW, MANY))
def test_every_mixer_sends_what_its_cost_says(P: int, layout: str, linear: str) -> None:
    spans = LAYOUTS.index(layout) + 1
    cut = Setting(P=P, world=P, spans=spans, B=2, passes=1, L=LENGTH, kv_bytes=4, linear=linear, link=LINK)
    for rank, counted in enumerate(run_ranks(count, P, layout, LINK, EVERY, linear=linear)):
        for name, bytes_ in counted.items():
            said = volume(mixer_cost(spec_of(name), CONTEXT), cut, rank)
            assert bytes_ == (said.forward, said.backward), f"{name} on rank {rank} of {P}, {layout}, {linear}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_that_are_not_kept_are_sent_again(layout: str) -> None:
    names = ["softmax", "sliding_window"]
    cut = Setting(P=3, world=3, spans=LAYOUTS.index(layout) + 1, B=2, passes=1, L=LENGTH, kv_bytes=4, keep_kv=False)
    for rank, counted in enumerate(run_ranks(count, 3, layout, LINK, names, keep_kv=False, kv_heads_per_gather=1)):
        for name, bytes_ in counted.items():
            said = volume(mixer_cost(spec_of(name), CONTEXT), cut, rank)
            assert bytes_ == (said.forward, said.backward), f"{name} on rank {rank}, {layout}"


@pytest.mark.parametrize(
    ("linear", "softmax"),
    [("ulysses", "ulysses"), ("megatron", "megatron"), ("ring_attention", "ring")],
)
@pytest.mark.parametrize("layout", tiered(["zigzag"], ["contiguous"]))
def test_baselines_send_what_their_cost_says(layout: str, linear: str, softmax: str) -> None:
    ring = softmax == "ring"
    P, spans = 3 if ring else 2, LAYOUTS.index(layout) + 1
    cut = Setting(P=P, world=P, spans=spans, B=2, passes=1, L=LENGTH, kv_bytes=4, linear=linear, softmax=softmax)
    facts = {name: mixer_cost(spec_of(name), CONTEXT) for name in EVERY}
    names = []
    for name, one in facts.items():
        try:
            volume(one, cut)
        except ValueError:  # heads that do not divide, decays that the left product does not take
            continue
        names.append(name)
    assert len(names) >= (8 if ring else 12)
    for rank, counted in enumerate(run_ranks(count, P, layout, LINK, names, linear=linear, softmax=softmax)):
        for name, bytes_ in counted.items():
            said = volume(facts[name], cut, rank)
            assert bytes_ == (said.forward, said.backward), f"{name} on rank {rank} of {P}, {layout}, {linear}"


@pytest.mark.parametrize(
    ("linear", "softmax"), [("all_gather", "all_gather"), ("ulysses", "ring"), ("ring_attention", "ulysses")]
)
def test_a_checkpoint_sends_again_by_a_baseline_alone_and_fp64_twice_the_bytes(linear: str, softmax: str) -> None:
    names = ["gla", "softmax"] if linear != "ring_attention" else ["retention", "softmax"]
    cut = Setting(P=2, world=2, spans=1, B=2, passes=1, L=LENGTH, kv_bytes=4, linear=linear, softmax=softmax, wide=2)
    strategies = {"dtype": torch.float64, "again": True, "linear": linear, "softmax": softmax}
    for rank, counted in enumerate(run_ranks(count, 2, "contiguous", LINK, names, **strategies)):
        for name, bytes_ in counted.items():
            facts = mixer_cost(mixer_spec(name), CONTEXT)
            said, once = volume(facts, cut, rank, again=True), volume(facts, cut, rank)
            assert bytes_ == (said.forward, said.backward), f"{name} on rank {rank}, {linear}, {softmax}"
            baseline = softmax != "all_gather" if name == "softmax" else linear != "all_gather"
            assert said.forward == once.forward * (2 if baseline else 1)


def test_auto_needs_the_link_by_which_it_has_chosen() -> None:
    cut = Setting(P=2, world=2, spans=1, B=2, passes=1, L=LENGTH, kv_bytes=4, linear="auto")
    with pytest.raises(ValueError, match="link by which .* neither in the recipe nor in the provenance"):
        volume(mixer_cost(mixer_spec("gla"), CONTEXT), cut)
    chosen = {
        exchange(summary, replace(cut, P=3, spans=2, link=LINK))
        for name in EVERY
        for summary in mixer_cost(spec_of(name), CONTEXT).summaries
    }
    assert len(chosen) > 1
