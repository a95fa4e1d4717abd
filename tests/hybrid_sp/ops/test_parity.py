"""Every operator on P ranks against the token loop: outputs, final states and every gradient, on every rank."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives, groups
from hybrid_sp.exchange import EXCHANGES
from hybrid_sp.kernels.reference import chunks
from tests.hybrid_sp.cases import (
    Case,
    delta_cases,
    halo_cases,
    latent_cases,
    linear_cases,
    measured,
    softmax_cases,
    terms,
    truth,
)
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

BOUND = 1e-10
LAYOUTS = ("contiguous", "zigzag")
FAMILIES = {
    "linear": linear_cases,
    "delta": delta_cases,
    "softmax": softmax_cases,
    "latent": latent_cases,
    "halo": halo_cases,
}


def check_cases(group: Any, cases: list[tuple[Case, dict[str, Tensor]]], chunk: int, rows: int) -> int:
    """On every rank: all cases, all tensors."""
    default = chunks.CHUNK, chunks.BLOCK_ROWS
    chunks.CHUNK, chunks.BLOCK_ROWS = chunk, rows
    try:
        for case, want in cases:
            shard = hsp.SequenceParallel(group, layout=case.layout).shard(case.length, case.documents)
            got = measured(case, group)
            assert got.keys() == want.keys()
            for name, value in got.items():
                expected = want[name]
                if value.shape != expected.shape:
                    expected = shard.take(expected)
                where = f"{case} {name} on rank {groups.rank(group)}"
                assert_close(where, value, expected, BOUND, partial(terms, case, name))
    finally:
        chunks.CHUNK, chunks.BLOCK_ROWS = default
    return len(cases)


@functools.lru_cache
def wanted(family: str) -> dict[Case, dict[str, Tensor]]:
    return {case: truth(case) for case in FAMILIES[family]()}


def half(cases: list[Any], world: int, layout: str) -> list[Any]:
    """Every second case; the other layout takes the rest."""
    return cases[(world + LAYOUTS.index(layout)) % 2 :: 2]


def check_family(world: int, layout: str, cases: list[tuple[Case, dict[str, Tensor]]]) -> None:
    cut = [(replace(case, layout=layout), want) for case, want in cases]
    assert run_ranks(check_cases, world, cut, 8, 64, deadline=120) == [len(cut)] * world


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("world", "layout"), [(1, "contiguous"), (2, "contiguous"), (2, "zigzag"), (4, "zigzag")])
def test_parity_fp64(world: int, layout: str, family: str) -> None:
    """Checks every case on one rank, and half of them on several."""
    cases = [*wanted(family).items()]
    check_family(world, layout, cases if world == 1 else half(cases, world, layout))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_parity_fp64_of_every_case(world: int, layout: str, family: str) -> None:
    check_family(world, layout, [*wanted(family).items()])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_on_eight_ranks(family: str) -> None:
    """Every third case: eight ranks on two cores take their time."""
    cases = [(replace(case, layout=LAYOUTS[i % 2]), want) for i, (case, want) in enumerate(wanted(family).items())]
    run_ranks(check_cases, 8, cases[::3], 8, 64, deadline=240)


@pytest.mark.parametrize("family", ["linear", "delta"])
@pytest.mark.parametrize("chunk", tiered([64], [4]))
def test_chunk_size_does_not_matter(chunk: int, family: str) -> None:
    cases = [(replace(case, layout="zigzag"), want) for case, want in wanted(family).items()]
    run_ranks(check_cases, 2, cases, chunk, 8192, deadline=120)


def check_overlap_is_bit_equal(group: Any, cases: list[Case]) -> None:
    for case in cases:
        with_overlap, without = (measured(replace(case, overlap=on, layout="zigzag"), group) for on in (True, False))
        for name in with_overlap:
            assert torch.equal(with_overlap[name], without[name]), f"{case} {name} on rank {groups.rank(group)}"


@pytest.mark.parametrize("step", tiered([3], [1]))
@pytest.mark.parametrize("family", FAMILIES)
def test_overlap_off_is_bit_equal(family: str, step: int) -> None:
    run_ranks(check_overlap_is_bit_equal, 2, FAMILIES[family]()[::step], deadline=120)


RMS_BOUND = {torch.float32: 5e-6, torch.bfloat16: 5e-3}


Seeds = list[dict[str, Tensor]]  # the tensors of a case, for each seed


def with_one_device(cases: list[tuple[Case, Seeds]], dtype: torch.dtype) -> list[tuple[Case, Seeds, Seeds]]:
    """Cases with their truths, and with what one device computes, for check_low_precision."""
    return [
        (case, truths, [measured(replace(case, seed=i), None, dtype) for i in range(len(truths))])
        for case, truths in cases
    ]


def check_low_precision(group: Any, cases: list[tuple[Case, Seeds, Seeds]], dtype: torch.dtype) -> None:
    """Errors against fp64 on the same rounded inputs: small on one device, and on P ranks at most twice as large. rms
    over a tensor and over seeds, since the rounding of a few numbers alone is a lottery."""
    for case, truths, of_one_device in cases:
        shard = hsp.SequenceParallel(group, layout=case.layout).shard(case.length, case.documents)
        errors: dict[str, Tensor] = {}
        for seed, (want, alone) in enumerate(zip(truths, of_one_device, strict=True)):
            for name, got in measured(replace(case, seed=seed), group, dtype).items():
                single, part, whole = alone[name].double(), got.double(), want[name]
                cut = part.shape != whole.shape
                pair = [
                    part - (shard.take(whole) if cut else whole),
                    shard.take(single - whole) if cut else single - whole,
                ]
                squares = torch.stack([x.square().sum() for x in pair])
                if cut:
                    collectives.all_reduce(squares, group, tag="test")
                errors[name] = errors.get(name, 0) + squares / whole.square().sum()
        for name, squares in errors.items():
            here_rms, alone_rms = (squares / len(truths)).sqrt().tolist()
            where = f"{case} {dtype} {name} on rank {groups.rank(group)}: {here_rms:.2e}, one device {alone_rms:.2e}"
            assert name not in ("o", "dq", "dk", "dv") or alone_rms <= RMS_BOUND[dtype], where
            assert here_rms <= 2 * alone_rms, where


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("world", "layout"), tiered([(2, "zigzag")], [(4, "contiguous")]))
def test_low_precision(world: int, layout: str, dtype: torch.dtype, family: str) -> None:
    """A fifth of the cases on 2 ranks, and all on 4."""
    cases = [case for case in FAMILIES[family]() if case.states or not case.causal or case.groups == 2]
    cases = [case for case in cases if case.operator != "shift" and case.window != 1]  # round nothing; no dq
    cases = cases[::5] if world == 2 else cases
    names = itertools.cycle(["all_gather"] if world == 2 else EXCHANGES)  # of linear layers
    given = [
        (
            replace(case, layout=layout, linear=name),  # the gradient of sinks has four numbers: more seeds
            [truth(replace(case, seed=seed), dtype) for seed in range(16 if case.sinks else 4)],
        )
        for case, name in zip(cases, names, strict=False)
    ]
    run_ranks(check_low_precision, world, with_one_device(given, dtype), dtype, deadline=600)
