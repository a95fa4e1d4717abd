"""The length from which a linear layer gathers less than a softmax layer: published numbers, and the formulas."""

from __future__ import annotations

from analysis.traffic import break_even_tokens
from hybrid_sp.exchange import EXCHANGES, Sizes, kv
from hybrid_sp.exchange.strategy import TokenSizes


def test_published_examples() -> None:
    # Equal precision: states against keys and values of head dim 128, with as many key heads and with a quarter.
    assert break_even_tokens(H=32, K=128, V=128, G=32, D=128, kv_bytes=4) == 64
    assert break_even_tokens(H=32, K=128, V=128, G=8, D=128, kv_bytes=4) == 256
    # fp32 states against 16-bit keys and values, and two spans on a rank, double it each.
    assert break_even_tokens(H=32, K=128, V=128, G=8, D=128) == 512
    assert break_even_tokens(H=32, K=128, V=128, G=8, D=128, spans=2) == 1024


def test_break_even_is_where_the_two_gathers_are_equal() -> None:
    P, B, shape = 4, 3, {"H": 8, "K": 64, "V": 64}
    tokens = break_even_tokens(transition="vector", G=2, D=64, **shape)
    states = Sizes(P, "contiguous", B * 8 * 64 * 64 * 4, B * 8 * 64 * 4)
    linear, _ = EXCHANGES["all_gather"].received(states, 0)
    for factor, sign in ((0.5, -1), (1, 0), (2, 1)):
        sizes = TokenSizes(P, "contiguous", B, int(P * tokens * factor), 128, 128, 128, 128, 2)
        softmax, _ = kv.STRATEGY.received(sizes)
        assert (softmax > linear) - (softmax < linear) == sign
