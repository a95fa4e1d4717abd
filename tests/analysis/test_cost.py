"""The cost model: published numbers, its scaling, and the ledger of real exchanges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hybrid_sp as hsp
from analysis import cost
from hybrid_sp.comm.groups import Group
from hybrid_sp.exchange import EXCHANGES
from layers.cost import STATE_BYTES, TRANSITIONS
from tests.support.ranks import run_ranks

STATE: dict[str, int] = {"B": 2, "H": 4, "K": 6, "V": 5}
KV: dict[str, int] = {"B": 2, "G": 2, "D": 8}


def test_published_examples() -> None:
    # LASP-2 section 3.4 with d the whole width: B=16, H=16, d=2048 is 1.07 billion elements, 2.14 GB in 16 bits.
    example = cost.linear_chain_forward(P=64, B=16, H=16, K=2048, V=2048, rank=1)
    assert example / STATE_BYTES == pytest.approx(1.07e9, rel=4e-3)
    # Equal precision: states against keys and values of head dim 128, with as many key heads and with a quarter.
    assert cost.break_even_tokens(H=32, K=128, V=128, G=32, D=128, kv_bytes=4) == 64
    assert cost.break_even_tokens(H=32, K=128, V=128, G=8, D=128, kv_bytes=4) == 256
    # fp32 states against 16-bit keys and values, and two spans on a rank, double it each.
    assert cost.break_even_tokens(H=32, K=128, V=128, G=8, D=128) == 512
    assert cost.break_even_tokens(H=32, K=128, V=128, G=8, D=128, spans=2) == 1024


def test_break_even_is_where_the_two_gathers_are_equal() -> None:
    P, B, shape = 4, 3, {"H": 8, "K": 64, "V": 64}
    tokens = cost.break_even_tokens(transition="vector", G=2, D=64, **shape)
    linear = cost.linear_all_gather_forward(P=P, B=B, transition="vector", **shape)
    for factor, sign in ((0.5, -1), (1, 0), (2, 1)):
        softmax = cost.softmax_all_gather_forward(P=P, B=B, L=int(P * tokens * factor), G=2, D=64)
        assert (softmax > linear) - (softmax < linear) == sign


@pytest.mark.parametrize(
    ("kind", "elements"), [("none", 0), ("fixed", 0), ("scalar", 1), ("vector", 6), ("matrix", 36)]
)
def test_transitions_travel_forward_only(kind: str, elements: int) -> None:
    forward = cost.linear_all_gather_forward(P=3, transition=kind, **STATE)
    assert forward - cost.linear_all_gather_forward(P=3, **STATE) == 2 * 2 * 4 * elements * 4
    assert cost.linear_gather_memory(P=3, transition=kind, **STATE) * 2 == forward * 3


def test_scaling_in_ranks_and_length() -> None:
    for P in (1, 2, 5):
        assert cost.linear_all_gather_backward(P=P, **STATE) == (P - 1) * 2 * 4 * 30 * 4
        for rank in range(P):
            chain = (
                cost.linear_chain_forward(P=P, rank=rank, **STATE),
                cost.linear_chain_backward(P=P, rank=P - 1 - rank, **STATE),
            )
            assert chain == (min(rank, 1) * 2 * 4 * 30 * 4,) * 2, "one hop, however many ranks"
        assert cost.ring_attention_forward(P=P, L=100, **KV) == cost.softmax_all_gather_forward(P=P, L=100, **KV)
    assert cost.softmax_all_gather_forward(P=4, L=800, **KV) == 2 * cost.softmax_all_gather_forward(P=4, L=400, **KV)
    assert cost.softmax_all_gather_forward(P=4, L=9, **KV) == 2 * 3 * 2 * 3 * 2 * 8 * 2, "padded to the longest rank"
    assert cost.softmax_gather_memory(P=4, L=9, **KV) == 2 * 2 * 12 * 2 * 8 * 2
    again = cost.softmax_all_gather_backward(P=4, L=8, keep_kv=False, **KV)
    assert again == cost.softmax_all_gather_backward(P=4, L=8, **KV) + cost.softmax_all_gather_forward(P=4, L=8, **KV)
    assert cost.ring_attention_backward(P=1, L=8, **KV) == 0
    assert cost.ring_attention_backward(P=4, L=8, **KV) == 2 * 2 * 2 * 2 * 8 * (3 * 2 + 4 * 4)


def test_ulysses_shrinks_with_ranks_and_is_bounded_by_heads() -> None:
    shape = {"B": 1, "L": 64, "H": 8, "G": 4, "D": 16}
    volumes = [cost.ulysses(P=P, **shape) for P in (1, 2, 4)]
    assert volumes == [(P - 1) * 64 * (2 * 8 + 2 * 4) * 16 * 2 // P**2 for P in (1, 2, 4)]
    with pytest.raises(ValueError, match="8 ranks must divide 8 and 4"):
        cost.ulysses(P=8, **shape)


def test_decoding() -> None:
    assert cost.decode_state(B=1, H=4, K=8, V=8) == 1024
    assert cost.decode_kv(B=1, L=10, G=2, D=8) == 640


@pytest.mark.parametrize("P", [0, 11])
def test_more_ranks_than_tokens_are_refused(P: int) -> None:
    with pytest.raises(ValueError, match=f"{P} ranks for a sequence of 10 tokens; take 1 to 10"):
        cost.span_tokens(10, P)


def count_exchanges(group: Group, length: int, layout: str, exchange: str) -> dict[str, tuple[int, int]]:
    """Bytes that this rank receives forward and backward, by kind of layer, as the ledger counts them."""
    shard = hsp.SequenceParallel(group, layout=layout, linear=exchange, check="calls").shard(length)
    B, H, K, V = STATE.values()
    T, G, D = shard.tokens, KV["G"], KV["D"]
    decays: dict[str, Any] = {
        "none": None,
        "fixed": torch.full((H,), -0.1),
        "scalar": torch.full((B, T, H), -0.1),
        "vector": torch.full((B, T, H, K), -0.1),
    }
    counted = {}

    def count(name: str, call: Any, *inputs: torch.Tensor) -> None:
        with hsp.ledger() as book:
            out = call(*(x.requires_grad_() for x in inputs))
            sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
        counted[name] = tuple(sum(row.bytes for row in book.select(direction=way)) for way in ("forward", "backward"))

    for name, decay in decays.items():
        q, k, v = torch.rand(B, T, H, K), torch.rand(B, T, H, K), torch.rand(B, T, H, V)
        if decay is not None and decay.dim() > 1:
            decay.requires_grad_()
        count(name, lambda *x, d=decay: hsp.linear_attention(*x, log_decay=d, shard=shard), q, k, v)
    q, k, v = torch.rand(B, T, H, K), torch.rand(B, T, H, K), torch.rand(B, T, H, V)
    count("normalised", lambda *x: hsp.linear_attention(*x, normalize=True, shard=shard), q, k, v)
    count("final", lambda *x: hsp.linear_attention(*x, return_final_state=True, shard=shard), q, k, v)
    q, k, v = torch.rand(B, T, H, K), torch.rand(B, T, H, K) / K, torch.rand(B, T, H, V)
    beta = torch.rand(B, T, H)
    count("matrix", lambda *x: hsp.delta_rule(*x, beta=beta, shard=shard), q, k, v)
    q, k, v = torch.rand(B, T, 2 * G, D), torch.rand(B, T, G, D), torch.rand(B, T, G, D)
    count("softmax", lambda *x: hsp.softmax_attention(*x, shard=shard), q, k, v)
    return counted


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("P", "length", "layout"), [(2, 24, "contiguous"), (2, 24, "zigzag"), (3, 25, "contiguous")])
def test_the_model_is_what_the_ledger_counts(P: int, length: int, layout: str, exchange: str) -> None:
    spans = 2 if layout == "zigzag" else 1
    softmax = (
        cost.softmax_all_gather_forward(P=P, L=length, kv_bytes=4, **KV),
        cost.softmax_all_gather_backward(P=P, L=length, kv_bytes=4, **KV),
    )
    kinds: dict[str, dict[str, Any]] = {kind: {"transition": kind} for kind in TRANSITIONS}
    kinds |= {"normalised": {"normalize": True}, "final": {"final_state": True}}
    for rank, counted in enumerate(run_ranks(count_exchanges, P, length, layout, exchange)):
        shape = {"P": P, "spans": spans, "rank": rank, **STATE}
        expected = {name: cost.linear_exchange(exchange, **shape, **kind) for name, kind in kinds.items()}
        assert counted == expected | {"softmax": softmax}, f"rank {rank} of {P}, {layout}"


def test_an_unknown_exchange_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'gossip'.*all_gather, ring, pipeline, doubling"):
        cost.linear_exchange("gossip", P=2, **STATE)
