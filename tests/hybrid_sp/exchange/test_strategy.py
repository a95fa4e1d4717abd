"""Every strategy says of itself what the ledger counts, and the registries hold the names of shard.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hybrid_sp as hsp
from hybrid_sp.baselines import BASELINES
from hybrid_sp.comm.groups import Group
from hybrid_sp.comm.link import Link
from hybrid_sp.exchange import EXCHANGES, Sizes, kv
from hybrid_sp.exchange.strategy import TokenSizes
from hybrid_sp.shard import LAYOUTS, neighbours
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

B, H, K, V = 2, 4, 6, 5
G, D = 2, 8  # of softmax layers
FORMS: dict[str, int] = {"none": 0, "fixed": 0, "scalar": 1, "vector": K, "matrix": K * K, "normalised": 0, "final": 0}


def test_names_are_those_of_the_registries() -> None:
    assert tuple(EXCHANGES) == hsp.shard.STATE_EXCHANGES
    assert {kind: tuple(strategies) for kind, strategies in BASELINES.items()} == hsp.shard.BASELINES
    every = [*EXCHANGES.values(), kv.STRATEGY, *BASELINES["linear"].values(), BASELINES["softmax"]["ring"]]
    assert len({strategy.label for strategy in every}) == len(every)


def counted(group: Group, length: int, layout: str, linear: str, softmax: str) -> dict[str, tuple[int, ...]]:
    """Bytes that this rank receives forward and backward, by form of the layer."""
    shard = hsp.SequenceParallel(group, layout=layout, linear=linear, softmax=softmax, check="calls").shard(length)
    T = shard.tokens
    found = {}

    def count(form: str, call: Any, *inputs: torch.Tensor) -> None:
        with hsp.ledger() as book:
            out = call(*(x.requires_grad_() for x in inputs))
            sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
        found[form] = tuple(sum(row.bytes for row in book.select(direction=way)) for way in ("forward", "backward"))

    def qkv() -> list[torch.Tensor]:
        return [torch.rand(B, T, H, K), torch.rand(B, T, H, K) / K, torch.rand(B, T, H, V)]

    shapes = {"none": None, "fixed": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}
    for form, shape in shapes.items():
        if form == "vector" and linear == "ring_attention":
            continue
        decay = None if shape is None else torch.full(shape, -0.1).requires_grad_(form != "fixed")
        count(form, lambda *x, d=decay: hsp.linear_attention(*x, log_decay=d, shard=shard), *qkv())
    if linear in EXCHANGES:
        count("normalised", lambda *x: hsp.linear_attention(*x, normalize=True, shard=shard), *qkv())
        count("final", lambda *x: hsp.linear_attention(*x, return_final_state=True, shard=shard), *qkv())
        count("matrix", lambda *x: hsp.delta_rule(*x, beta=torch.rand(B, T, H), shard=shard), *qkv())
    q, k, v = torch.rand(B, T, 2 * G, D), torch.rand(B, T, G, D), torch.rand(B, T, G, D)
    count("softmax", lambda *x: hsp.softmax_attention(*x, shard=shard), q, k, v)
    return found


def of_states(exchange: str, P: int, layout: str, rank: int) -> dict[str, tuple[int, int]]:
    found = {}
    for form, transition in FORMS.items():
        state = B * H * (K * V + (K if form == "normalised" else 0)) * 4
        sizes = Sizes(P, layout, state, B * H * transition * 4, final=form == "final")
        found[form] = EXCHANGES[exchange].received(sizes, rank)
    return found


def of_softmax(strategy: str, P: int, layout: str, length: int) -> tuple[int, int]:
    sizes = TokenSizes(P, layout, B, length, 2 * G * D, G * D, G * D, 2 * G * D, 4, heads=2 * G, groups=G)
    return ({"all_gather": kv.STRATEGY} | BASELINES["softmax"])[strategy].received(sizes)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("P", "length", "layout"), [(2, 24, "contiguous"), (2, 24, "zigzag"), (3, 25, "contiguous")])
def test_exchanges_of_states_receive_what_they_say(P: int, length: int, layout: str, exchange: str) -> None:
    for rank, found in enumerate(run_ranks(counted, P, length, layout, exchange, "all_gather")):
        want = of_states(exchange, P, layout, rank) | {"softmax": of_softmax("all_gather", P, layout, length)}
        assert found == want, f"rank {rank} of {P}, {layout}"


@pytest.mark.parametrize(
    ("linear", "softmax"), tiered([("ring_attention", "ring"), ("megatron", "megatron")], [("ulysses", "ulysses")])
)
def test_baselines_receive_what_they_say(linear: str, softmax: str) -> None:
    P, length, layout = 2, 24, "zigzag"
    for rank, found in enumerate(run_ranks(counted, P, length, layout, linear, softmax)):
        want = {"softmax": of_softmax(softmax, P, layout, length)}
        for form in ("none", "fixed", "scalar", "vector"):
            gates = {"scalar": H, "vector": H * K}.get(form, 0)
            decays = H * FORMS[form]
            sizes = TokenSizes(P, layout, B, length, H * K, H * K, H * V, H * V, 4, gates, decays, H, H)
            if form in found:
                want[form] = BASELINES["linear"][linear].received(sizes)
        assert found == want, f"rank {rank}"


def test_sizes_do_not_depend_on_the_length_and_grow_with_ranks_as_published() -> None:
    # LASP-2 section 3.4 with d the whole width: B=16, H=16, d=2048 is 1.07 billion elements, 2.14 GB in 16 bits.
    example = EXCHANGES["ring"].received(Sizes(64, "contiguous", 16 * 16 * 2048 * 2048 * 4), 1)[0]
    assert example / 4 == pytest.approx(1.07e9, rel=4e-3)
    for P in (1, 2, 5):
        sizes = Sizes(P, "contiguous", 240)
        assert EXCHANGES["all_gather"].received(sizes, 0) == ((P - 1) * 240, (P - 1) * 240)
        for rank in range(P):
            forward, backward = EXCHANGES["ring"].received(sizes, rank)
            assert (forward, backward) == (240 * (rank > 0), 240 * (rank < P - 1)), "one hop, however many ranks"
    assert BASELINES["softmax"]["ring"].received(TokenSizes(1, "contiguous", 2, 8, 32, 16, 16, 32, 2)) == (0, 0)


def test_heads_that_ranks_do_not_divide_and_decays_that_no_product_takes_are_refused() -> None:
    sizes = TokenSizes(8, "contiguous", 1, 64, 128, 64, 64, 128, 2, heads=8, groups=4)
    with pytest.raises(ValueError, match="8 ranks must divide 8 and 4"):
        BASELINES["softmax"]["ulysses"].received(sizes)
    with pytest.raises(ValueError, match="no decay per key channel"):
        BASELINES["linear"]["ring_attention"].received(sizes._replace(decays=16))
    for P in (0, 65):
        with pytest.raises(ValueError, match=f"{P} ranks for a sequence of 64 tokens; take 1 to 64"):
            _ = sizes._replace(ranks=P).rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbours_and_owners(layout: str) -> None:
    for P in (1, 2, 3, 4):
        sizes = Sizes(P, layout, 1)
        owners = [sizes.owner(span) for span in range(P * sizes.spans)]
        for rank in range(P):
            own = [span for span, owner in enumerate(owners) if owner == rank]
            assert tuple(own) == sizes.own(rank)
            before = sum(span > 0 and owners[span - 1] != rank for span in own)
            after = sum(span + 1 < len(owners) and owners[span + 1] != rank for span in own)
            assert neighbours(rank, P, layout) == (before, after)
        assert sizes.hops == sum(a != b for a, b in zip(owners, owners[1:], strict=False))
        assert owners[-1] == sizes.last_owner


def test_seconds_rank_the_strategies() -> None:
    """Little bytes on a slow-to-answer link want few rounds; many bytes want the pipeline."""
    latent, narrow = Link(latency=1.0, bandwidth=1e12), Link(latency=0.0, bandwidth=1.0)
    sizes = Sizes(8, "contiguous", 1000)
    by_latency = {name: one.seconds(latent, sizes) for name, one in EXCHANGES.items()}
    assert by_latency == pytest.approx({"all_gather": 14, "ring": 14, "pipeline": 20, "doubling": 6, "star": 4})
    by_bytes = {name: one.seconds(narrow, sizes) for name, one in EXCHANGES.items()}
    assert min(by_bytes, key=lambda name: by_bytes[name]) == "pipeline" and max(by_bytes.values()) == by_bytes["star"]
