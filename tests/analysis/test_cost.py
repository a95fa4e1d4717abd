"""The cost model: where a linear layer's gather is the smaller one, and the bytes of halos and gradients."""

from __future__ import annotations

import pytest
import torch

import hybrid_sp as hsp
from analysis import cost
from hybrid_sp.comm.groups import Group
from hybrid_sp.exchange import EXCHANGES, Sizes, kv
from hybrid_sp.exchange.strategy import TokenSizes
from layers.cost import transition_elements
from tests.support.ranks import run_ranks

HALO: dict[str, int] = {"tokens": 3, "channels": 5}


def test_published_examples() -> None:
    # Equal precision: states against keys and values of head dim 128, with as many key heads and with a quarter.
    assert cost.break_even_tokens(H=32, K=128, V=128, G=32, D=128, kv_bytes=4) == 64
    assert cost.break_even_tokens(H=32, K=128, V=128, G=8, D=128, kv_bytes=4) == 256
    # fp32 states against 16-bit keys and values, and two spans on a rank, double it each.
    assert cost.break_even_tokens(H=32, K=128, V=128, G=8, D=128) == 512
    assert cost.break_even_tokens(H=32, K=128, V=128, G=8, D=128, spans=2) == 1024


def test_break_even_is_where_the_two_gathers_are_equal() -> None:
    P, B, shape = 4, 3, {"H": 8, "K": 64, "V": 64}
    tokens = cost.break_even_tokens(transition="vector", G=2, D=64, **shape)
    states = Sizes(P, "contiguous", B * 8 * 64 * 64 * 4, B * 8 * 64 * 4)
    linear, _ = EXCHANGES["all_gather"].received(states, 0)
    for factor, sign in ((0.5, -1), (1, 0), (2, 1)):
        sizes = TokenSizes(P, "contiguous", B, int(P * tokens * factor), 128, 128, 128, 128, 2)
        softmax, _ = kv.STRATEGY.received(sizes)
        assert (softmax > linear) - (softmax < linear) == sign


def test_gradients() -> None:
    assert cost.gradient_all_reduce(P=4, parameters=1000) == 6000


def test_an_unknown_transition_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'diagonal'.*none, fixed, scalar, vector, matrix"):
        transition_elements("diagonal", 4)


def count_halo(group: Group, length: int, layout: str) -> tuple[int, ...]:
    shard = hsp.SequenceParallel(group, layout=layout).shard(length)
    x = torch.rand(2, shard.tokens, HALO["channels"], requires_grad=True)
    weight = torch.rand(HALO["channels"], HALO["tokens"] + 1, requires_grad=True)
    with hsp.ledger() as book:
        out = hsp.short_conv(x, weight, shard=shard)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()
    return tuple(sum(row.bytes for row in book.select(direction=way)) for way in ("forward", "backward"))


@pytest.mark.parametrize(("P", "length", "layout"), [(2, 24, "contiguous"), (2, 24, "zigzag"), (3, 25, "contiguous")])
def test_the_model_of_halos_is_what_the_ledger_counts(P: int, length: int, layout: str) -> None:
    for rank, counted in enumerate(run_ranks(count_halo, P, length, layout)):
        halo = {"P": P, "B": 2, "spans": 2 if layout == "zigzag" else 1, "rank": rank, **HALO}
        assert counted == (cost.halo_forward(**halo, element_bytes=4), cost.halo_backward(**halo)), f"rank {rank}"
