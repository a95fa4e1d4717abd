"""Ring Attention, Ulysses and Megatron-SP against the token loop, for every kind of layer that they serve."""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hybrid_sp as hsp
from hybrid_sp.baselines import left_product
from hybrid_sp.comm import collectives, groups
from tests.hybrid_sp.cases import (
    LONG_DOCUMENTS,
    SHORT_DOCUMENTS,
    Case,
    delta_cases,
    linear_cases,
    measured,
    softmax_cases,
    truth,
)
from tests.hybrid_sp.ops.test_parity import (
    check_cases,
    check_low_precision,
    check_overlap_is_bit_equal,
    half,
    with_one_device,
)
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

LAYOUTS = ("contiguous", "zigzag")
HEADS, RINGS = ("ulysses", "megatron"), ("ring", "ring_attention")


def cases_of(baseline: str) -> list[Case]:
    """A selection of what a baseline takes."""
    if baseline == "ring_attention":
        kinds = [case for case in linear_cases() if case.decay != "vector" and not (case.bonus or case.states)]
        kinds += [Case(decay=decay, normalize=True, groups=2) for decay in (None, "fixed", "scalar")]
        kinds += [Case(decay="scalar", documents=LONG_DOCUMENTS), Case(decay="fixed", documents=LONG_DOCUMENTS)]
        return [replace(case, linear=baseline) for case in kinds]
    if baseline == "ring":
        return [replace(case, softmax=baseline) for case in softmax_cases() if case.window not in (2, 200)]
    softmax = [case for case in softmax_cases() if case.window in (None, 16)]
    return [replace(case, softmax=baseline, linear=baseline) for case in (*linear_cases(), *delta_cases(), *softmax)]


@functools.lru_cache
def wanted(case: Case) -> dict[str, Tensor]:
    """The truth, whatever the strategy."""
    plain = replace(case, linear="all_gather", softmax="all_gather", layout="contiguous")
    return truth(case) if case == plain else wanted(plain)


def check_in_tiles(group: Any, cases: list[tuple[Case, dict[str, Tensor]]]) -> None:
    """With tiles that the spans here have several of."""
    tiles = left_product.QUERIES, left_product.KEYS
    left_product.QUERIES, left_product.KEYS = 8, 12
    try:
        check_cases(group, cases, 8, 64)
    finally:
        left_product.QUERIES, left_product.KEYS = tiles


def check_heads(baseline: str, world: int, layout: str, turn: int = 0, of: int = 1) -> None:
    cases = [case for case in cases_of(baseline) if case.groups % world == 0][turn::of]
    run_ranks(check_cases, world, [(replace(case, layout=layout), wanted(case)) for case in cases], 8, 64)


@pytest.mark.parametrize(
    ("baseline", "world", "layout"),
    [("ulysses", 2, "contiguous"), ("ulysses", 2, "zigzag"), ("megatron", 4, "zigzag")],
)
def test_cutting_heads(baseline: str, world: int, layout: str) -> None:
    """A third of the cases each."""
    check_heads(baseline, world, layout, (world + LAYOUTS.index(layout)) % 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("baseline", HEADS)
def test_cutting_heads_in_every_case(baseline: str, world: int, layout: str) -> None:
    check_heads(baseline, world, layout)


FEW_RINGS = [
    ("ring", 4, "contiguous"),
    *itertools.product(RINGS, (2,), LAYOUTS),
    *itertools.product(RINGS, (3,), ["zigzag"]),
]
MANY_RINGS = [one for one in itertools.product(RINGS, (3, 4), LAYOUTS) if one not in FEW_RINGS]


@pytest.mark.parametrize(("baseline", "world", "layout"), tiered(FEW_RINGS, MANY_RINGS))
def test_rings(baseline: str, world: int, layout: str) -> None:
    """Half of the cases each."""
    cases = [replace(case, layout=layout) for case in half(cases_of(baseline), world, layout)]
    run_ranks(check_in_tiles, world, [(case, wanted(case)) for case in cases])


def test_one_rank_takes_the_same_path() -> None:
    cases = [case for baseline in (*HEADS, *RINGS) for case in cases_of(baseline)[::5]]
    cases = [replace(case, layout=LAYOUTS[i % 2]) for i, case in enumerate(cases)]
    check_in_tiles(None, [(case, wanted(case)) for case in cases])


def check_strided(group: Any, cases: list[tuple[Case, dict[str, Tensor]]]) -> None:
    mesh = hsp.init_mesh(dp=2, sp=2)
    outer = mesh["dp"].get_group()  # ranks [0, 2] and [1, 3]
    check_in_tiles(outer, cases)


@pytest.mark.parametrize("step", tiered([11], [7]))
def test_ranks_that_are_not_neighbours_in_the_world(step: int) -> None:
    cases = [replace(case, layout="zigzag") for baseline in (*HEADS, *RINGS) for case in cases_of(baseline)[::step]]
    run_ranks(check_strided, 4, [(case, wanted(case)) for case in cases if case.groups % 2 == 0])


@pytest.mark.parametrize("baseline", [*HEADS, *RINGS])
def test_overlap_off_is_bit_equal(baseline: str) -> None:
    cases = [case for case in cases_of(baseline)[::5] if case.groups % 2 == 0]
    run_ranks(check_overlap_is_bit_equal, 2, cases)


@pytest.mark.parametrize(("world", "layout"), tiered([(2, "zigzag")], [(4, "contiguous")]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype, world: int, layout: str) -> None:
    """A third of the cases in either dtype on 2 ranks, and all on 4."""
    kinds = [
        Case(decay="scalar", states=True, groups=2),
        Case(decay="vector", normalize=True, states=True, groups=2),
        Case(operator="delta", decay="scalar", states=True),
        Case(operator="softmax", groups=2),
    ]
    cases = [replace(case, linear=baseline, softmax=baseline) for case in kinds for baseline in HEADS]
    cases += [replace(case, softmax="ring") for case in (Case(operator="softmax", groups=2, window=16), kinds[3])]
    cases += [Case(operator="softmax", groups=2, softmax="ring", causal=False)]
    cases += [Case(linear="ring_attention", decay=decay, groups=2) for decay in (None, "fixed", "scalar")]
    cases += [Case(linear="ring_attention", normalize=True, groups=2, decay="scalar")]
    cases = [case for case in cases if case.groups % world == 0 or "ring" in case.linear + case.softmax]
    cases = cases[dtype == torch.bfloat16 :: 3] if world == 2 else cases
    plain = [replace(case, linear="all_gather", softmax="all_gather") for case in cases]
    found = {case: [truth(replace(case, seed=seed), dtype) for seed in range(4)] for case in set(plain)}
    given = [(replace(case, layout=layout), found[same]) for case, same in zip(cases, plain, strict=True)]
    run_ranks(check_low_precision, world, with_one_device(given, dtype), dtype)


LAYERS = [  # of one model each: what the layers need of the heads and the states is in `cases_of`
    *(Case(operator=operator, linear=form, softmax=form) for form in HEADS for operator in ("delta", "softmax")),
    *(Case(decay="scalar", linear=form, states=True) for form in HEADS),
    Case(decay="scalar", linear="ring_attention"),
    Case(operator="softmax", softmax="ring", groups=2),
]


def leaves(case: Case, group: Any) -> tuple[hsp.Shard, dict[str, Tensor]]:
    sp = hsp.SequenceParallel(group, layout="zigzag", linear=case.linear, softmax=case.softmax, check="calls")
    shard = sp.shard(case.length, case.documents)
    x = {name: v if case.whole(name) else shard.take(v) for name, v in case.inputs().items()}
    return shard, {name: value.detach().requires_grad_() for name, value in x.items()}


def loss(case: Case, x: dict[str, Tensor], shard: hsp.Shard) -> Tensor:
    o, finals = case.call(x, shard)
    return sum((final.sum() for final in finals), o.square().sum())


def partial_gradients(group: Any, cases: list[Case]) -> None:
    """Each input alone: as the only one that is asked for, and as the only one that needs a gradient."""
    for case in cases:
        shard, x = leaves(case, group)
        whole = torch.autograd.grad(loss(case, x, shard), list(x.values()))
        for name, want in zip(x, whole, strict=True):
            (asked,) = torch.autograd.grad(loss(case, x, shard), x[name])
            alone = {other: leaf.detach().requires_grad_(other == name) for other, leaf in x.items()}
            (needed,) = torch.autograd.grad(loss(case, alone, shard), alone[name])
            where = f"{case} d{name} on rank {groups.rank(group)}"
            assert torch.equal(asked, want) and torch.equal(needed, want), where


@pytest.mark.parametrize("cases", tiered([LAYERS[::2]], [LAYERS[1::2]]), ids=["even", "odd"])
def test_an_input_alone_has_the_gradient_that_it_has_among_all(cases: list[Case]) -> None:
    run_ranks(partial_gradients, 2, cases)


def final_state_alone(group: Any) -> None:
    """A loss on the final state alone, and one on the output alone."""
    for form in HEADS:
        case = Case(decay="scalar", states=True, linear=form)
        plain = replace(case, linear="all_gather")
        for part in (0, 1):
            found = []
            for kind in (case, plain):
                shard, x = leaves(kind, group)
                o, finals = kind.call(x, shard)
                outputs = [o, *finals][part]
                grads = torch.autograd.grad(outputs.square().sum(), list(x.values()), materialize_grads=True)
                whole = [kind.whole(name) for name in x]  # whose contributions are cut otherwise
                found.append(
                    [
                        collectives.all_reduce(g.clone(), group, "test") if w else g
                        for g, w in zip(grads, whole, strict=True)
                    ]
                )
            for got, want in zip(*found, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_a_loss_on_one_of_the_outputs() -> None:
    run_ranks(final_state_alone, 2)


def checkpointed(group: Any, cases: list[Case]) -> None:
    """The recomputation communicates again, with and without records; two layers, so that records are of both."""
    for case in cases:
        shard, x = leaves(case, group)

        def body(*inputs: Tensor, case: Case = case, x: dict[str, Tensor] = x, shard: hsp.Shard = shard) -> Tensor:
            first = dict(zip(x, inputs, strict=True))
            second = first | {"q": first["q"] * loss(case, first, shard).tanh()}
            return loss(case, second, shard)

        want = torch.autograd.grad(body(*x.values()), list(x.values()))
        for options in ({}, {"context_fn": hsp.checkpoint_contexts}):
            out = checkpoint(body, *x.values(), use_reentrant=False, **options)
            for got, expected in zip(torch.autograd.grad(out, list(x.values())), want, strict=True):
                assert torch.equal(got, expected), f"{case} {options} on rank {groups.rank(group)}"


@pytest.mark.parametrize("cases", tiered([LAYERS[1::2]], [LAYERS[::2]]), ids=["odd", "even"])
def test_checkpoints_have_the_same_gradients(cases: list[Case]) -> None:
    run_ranks(checkpointed, 2, cases)


REFUSED = [
    (
        Case(groups=2, heads=4, linear="ulysses"),
        4,
        'linear_attention: linear="ulysses" cuts heads: 4 ranks must divide',
    ),
    (Case(operator="delta", linear="megatron"), 3, 'delta_rule: linear="megatron" cuts heads: 3 ranks .* 4 heads of q'),
    (
        Case(operator="softmax", softmax="ulysses", groups=1),
        2,
        "softmax_attention: .* the 1 heads of k; take fewer ranks",
    ),
    (Case(operator="delta", linear="ring_attention"), 2, 'delta_rule: linear="ring_attention" takes linear_attention'),
    (Case(decay="vector", linear="ring_attention"), 2, "linear_attention: .* not one per key channel"),
    (Case(bonus=True, linear="ring_attention"), 2, "linear_attention: .* takes no bonus"),
    (Case(states=True, linear="ring_attention"), 2, "linear_attention: .* takes no initial_state"),
]


def refusals(group: Any, cases: list[tuple[Case, str]]) -> int:
    for case, words in cases:
        with hsp.ledger() as book, pytest.raises(ValueError, match=words):
            measured(case, group)
        assert not book.rows
    return len(cases)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_a_baseline_cannot_do_is_refused_by_name(world: int) -> None:
    cases = [(case, words) for case, ranks, words in REFUSED if ranks == world]
    assert run_ranks(refusals, world, cases) == [len(cases)] * world
    with pytest.raises(ValueError, match=re.escape("SequenceParallel.linear must be one of")):
        hsp.SequenceParallel(None, linear="ring attention")


def leaks(group: Any) -> None:
    """Change one token: the outputs that see it move, and no other by a bit."""
    for case in LAYERS:
        case = replace(case, documents=SHORT_DOCUMENTS, length=107, states=False)
        shard, x = leaves(case, group)
        before = case.call(x, shard)[0].detach()
        changed, end = 61, 107  # in the last document
        with torch.no_grad():
            here = torch.cat([torch.arange(a, b) for a, b in shard.spans]) == changed
            for name in ("k", "v"):
                x[name][:, here] += 1.0
        after = case.call(x, shard)[0].detach()
        tokens = torch.cat([torch.arange(a, b) for a, b in shard.spans])
        moved = (before != after).flatten(2).any(2)[0]
        sees = (tokens >= changed) & (tokens < end)
        assert torch.equal(moved, sees), f"{case} on rank {shard.sp.rank}"


def test_a_token_moves_those_that_see_it_alone() -> None:
    run_ranks(leaks, 4)
