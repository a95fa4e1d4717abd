"""Log decays that are finite and at most 0, down to the smallest float: of what they cut off nothing is left, and what
follows them is as exact as without them, on P ranks, forward and backward."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.baselines import left_product
from hybrid_sp.checks import FLOORS, floor_decays
from hybrid_sp.comm import groups
from hybrid_sp.kernels.reference import chunks
from tests.hybrid_sp.cases import Case, measured, truth
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks

BOUNDS = {torch.float64: 1e-10, torch.float32: 5e-6}
LENGTH = 45
SHORT, LONG = (0, 1, 11, 12, 22, 23, 26, 45), (0, 5, 40, 45)  # documents

Wanted = tuple[Case, torch.dtype, dict[str, Tensor]]


def cases() -> list[Case]:
    short, long = {"documents": SHORT}, {"documents": LONG, "states": True}
    kinds = [
        Case(decay="fixed", states=True),
        Case(decay="scalar", states=True, groups=1),
        Case(decay="vector", states=True),
        Case(decay="scalar", normalize=True, states=True),
        Case(decay="scalar", bonus=True, states=True),
        Case(decay="vector", bonus=True, **short),
        Case(decay="scalar", **short),
        Case(decay="vector", normalize=True, **long),
        Case(decay="scalar", linear="ring_attention"),
        Case(operator="delta", decay="scalar", states=True),
        Case(operator="delta", decay="vector", states=True, groups=1),
        Case(operator="delta", decay="scalar", **short),
        Case(operator="delta", decay="vector", **long),
    ]
    size = {"length": LENGTH, "heads": 2}
    some = [replace(case, strong="some", groups=min(case.groups, 2), seed=i, **size) for i, case in enumerate(kinds)]
    alone = [case for case in some if case.states and not (case.documents or case.normalize)]
    return some + [replace(case, strong="all") for case in alone]


@functools.lru_cache
def wanted(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return truth(case, dtype)


def check_cases(group: Any, given: list[Wanted], chunk: int) -> int:
    """All tensors on every rank, in chunks and tiles of so many tokens."""
    default = chunks.CHUNK, left_product.QUERIES, left_product.KEYS
    chunks.CHUNK = left_product.QUERIES = left_product.KEYS = chunk
    try:
        for case, dtype, want in given:
            shard = hsp.SequenceParallel(group, layout=case.layout).shard(case.length, case.documents)
            for name, value in measured(case, group, dtype).items():
                expected = want[name] if value.shape == want[name].shape else shard.take(want[name])
                where = f"{case} {dtype} {name} on rank {groups.rank(group)}"
                assert_close(where, value.double(), expected, BOUNDS[dtype])
    finally:
        chunks.CHUNK, left_product.QUERIES, left_product.KEYS = default
    return len(given)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_agree_with_the_token_loop(world: int) -> None:
    """In chunks of eight, so that many begin or end with a strong decay. Where the truth is exactly zero, as the
    gradients of decays of which all are strong, so are we. Cases take turns with dtypes and layouts."""
    given = []
    for i, case in enumerate(cases(), world):
        dtype, layout = list(BOUNDS)[i % 2], ("contiguous", "zigzag")[i // 2 % 2]
        given.append((replace(case, layout=layout), dtype, wanted(case, dtype)))
    assert run_ranks(check_cases, world, given, 8) == [len(given)] * world


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("operator", ["linear", "delta"])
@pytest.mark.parametrize("length", [1, 64, 130])
def test_whole_chunks_agree_with_the_token_loop(length: int, operator: str, decay: str) -> None:
    case = Case(operator=operator, decay=decay, strong="some", states=True, length=length, groups=1, heads=2)
    check_cases(None, [(case, dtype, wanted(case, dtype)) for dtype in BOUNDS], chunks.CHUNK)


@pytest.mark.parametrize("size", [-1e9, -1e15, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 4, 1, 1)], ids=["scalar", "vector"])
def test_what_follows_a_mask_decays_as_it_says(shape: tuple[int, ...], size: float) -> None:
    ones, g = torch.ones(1, 4, 1, 1), torch.tensor([0.0, size, -0.3, -0.3]).view(shape)
    o = hsp.linear_attention(ones, ones, ones, log_decay=g, scale=1.0)
    assert isinstance(o, Tensor)
    a = math.exp(-0.3)
    torch.testing.assert_close(o.flatten(), torch.tensor([1.0, 1.0, 1 + a, 1 + a + a * a]))


def call(operator: str, g: Tensor, shard: hsp.Shard | None = None) -> Any:
    x = torch.ones(1, 6, 2, 4)
    if operator == "delta_rule":
        return hsp.delta_rule(x, x, x, beta=x[..., 0], log_decay=g, shard=shard)
    return hsp.linear_attention(x, x, x, log_decay=g, shard=shard)


@pytest.mark.parametrize("shape", [(2,), (1, 6, 2), (1, 6, 2, 4)], ids=str)
def test_minus_infinity_is_refused(shape: tuple[int, ...]) -> None:
    g = torch.zeros(shape)
    g[(-1,) * len(shape)] = float("-inf")
    for operator in ("linear_attention", "delta_rule")[: len(shape)]:
        with pytest.raises(ValueError, match=f"{operator}: log_decay must be finite, got -inf"):
            call(operator, g)


def check_refused(group: Any) -> None:
    """By all ranks, since each has one here."""
    with hsp.ledger() as book:
        for linear in ("all_gather", "ulysses", "ring_attention"):
            shard = hsp.SequenceParallel(group, linear=linear).shard(12)
            with pytest.raises(ValueError, match="log_decay must be finite"):
                call("linear_attention", torch.full((1, 6, 2), float("-inf")), shard)
    assert not book.calls


def test_minus_infinity_is_refused_before_any_communication() -> None:
    run_ranks(check_refused, 2)


@pytest.mark.parametrize("operator", ["linear_attention", "delta_rule"])
def test_nan_is_handed_on(operator: str) -> None:
    g = torch.full((1, 6, 2), -1e30)
    g[0, 3, 1] = float("nan")
    lost = call(operator, g).isnan().any(-1)[0]
    assert not lost[:, 0].any() and lost[3:, 1].all()


def test_no_value_is_looked_at_on_a_device() -> None:
    """Which has the host wait. A meta tensor has none."""
    g = floor_decays("linear_attention", torch.empty(1, 6, 2, device="meta"), torch.float32)
    assert g is not None and g.device.type == "meta"


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_a_floor_decays_to_zero_and_is_a_number_of_every_dtype(dtype: torch.dtype) -> None:
    floor = torch.tensor(FLOORS[dtype], dtype=dtype)
    assert floor.exp() == 0
    assert all(floor == floor.to(narrow) for narrow in (torch.bfloat16, torch.float16, torch.float32))
