"""Rotary positions: relative, exact far away, counted on from shards and caches."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from layers.cache import LayerCache
from layers.rotary import RopeScaling, rotate, token_positions
from tests.support.oracle import assert_close, relative


def test_rotation_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).view(1, 1, 1, 4)
    (y,) = rotate(torch.tensor([3]), 100.0, x)
    c0, s0, c1, s1 = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    want = torch.tensor([c0 - 3 * s0, 2 * c1 - 4 * s1, 3 * c0 + s0, 4 * c1 + 2 * s1], dtype=torch.float64)
    assert_close("y", y.flatten(), want, 1e-14)


def test_positions_keep_the_angles_of_every_base_width_and_dtype_apart() -> None:
    positions = torch.tensor([3, 5])
    for dtype in (torch.float64, torch.float32):
        for base in (1e2, 1e4):
            for width in (4, 8):
                x = torch.randn(1, 2, 1, width, dtype=dtype)
                kept, new = (rotate(where, base, x)[0] for where in (positions, positions.clone()))
                assert torch.equal(kept, new), (dtype, base, width)


def test_channels_after_the_first_stay() -> None:
    x = torch.randn(1, 3, 2, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (y,) = rotate(torch.tensor([0, 4, 9]), 100.0, x, channels=4)
    assert torch.equal(y[..., 4:], x[..., 4:])
    (alone,) = rotate(torch.tensor([0, 4, 9]), 100.0, x[..., :4])
    assert torch.equal(y[..., :4], alone)


SCALING = RopeScaling(factor=8.0, original_length=1000, beta_fast=20.0, beta_slow=2.0)


def test_yarn_by_hand() -> None:
    """Pairs 0 to 7 of base 1e4 turn 1000 / 2 pi times and fewer; 20 turns are between pairs 1 and 2, 2 turns between 3
    and 4."""
    turns = [1000 / (2 * math.pi) * 1e4 ** (-pair / 8) for pair in range(8)]
    assert turns[1] > 20 > turns[2] and turns[3] > 2 > turns[4]
    shares = [0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1]  # a straight line from pair 1 to pair 4
    x = torch.zeros(1, 1, 1, 16, dtype=torch.float64)
    x[..., :8] = 1.0
    (y,) = rotate(torch.tensor([5]), 1e4, x, scaling=SCALING)
    for pair, share in enumerate(shares):
        angle = 5 * 1e4 ** (-pair / 8) * (share / 8 + 1 - share)
        size = 1 + 0.1 * math.log(8)
        assert y[0, 0, 0, pair].item() == pytest.approx(size * math.cos(angle), abs=1e-14)
        assert y[0, 0, 0, pair + 8].item() == pytest.approx(size * math.sin(angle), abs=1e-14)


def test_positions_keep_scaled_angles_apart() -> None:
    x, positions = torch.randn(1, 2, 1, 8, dtype=torch.float64), torch.tensor([30, 500])
    plain, scaled, again = (rotate(positions, 1e4, x, scaling=one)[0] for one in (None, SCALING, None))
    assert torch.equal(plain, again) and relative(scaled, plain) > 0.1


def test_a_factor_of_one_scales_nothing() -> None:
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    none = RopeScaling(factor=1.0, original_length=10)
    assert_close("y", rotate(torch.tensor([7]), 1e4, x, scaling=none)[0], rotate(torch.tensor([7]), 1e4, x)[0], 1e-14)


def test_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = []
    for shift in (0, 5, 1_000_003):
        rotated_q, _ = rotate(torch.tensor([7 + shift]), 1e4, q, k)
        _, rotated_k = rotate(torch.tensor([2 + shift]), 1e4, q, k)
        products.append((rotated_q * rotated_k).sum(-1))
    assert_close("shift 5", products[1], products[0], 1e-12)
    assert_close("shift 1000003", products[2], products[0], 1e-8)
    assert relative(products[0], (q * k).sum(-1)) > 0.1


def test_a_million_tokens_away_fp32_is_as_exact_as_nearby() -> None:
    x = torch.randn(1, 1, 2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for position in (3, 1_000_003):
        (exact,) = rotate(torch.tensor([position]), 1e4, x)
        (single,) = rotate(torch.tensor([position]), 1e4, x.float())
        (half,) = rotate(torch.tensor([position]), 1e4, x.bfloat16())
        assert single.dtype == torch.float32 and relative(single, exact) < 1e-6
        assert half.dtype == torch.bfloat16 and relative(half, exact) < 1e-2


def test_positions_come_from_the_shard_or_count_on_from_the_cache() -> None:
    x = torch.zeros(1, 3, 4)
    assert token_positions(x, None, None).tolist() == [0, 1, 2]
    cache = LayerCache(position=5, tensors=())
    assert token_positions(x, None, cache).tolist() == [5, 6, 7]
    shard = SimpleNamespace(positions=torch.tensor([2, 3, 9]))
    assert token_positions(x, shard, None).tolist() == [2, 3, 9]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both a shard and a cache"):
        token_positions(x, shard, cache)  # type: ignore[arg-type]
