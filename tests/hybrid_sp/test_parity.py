"""Every operator on P ranks against the token loop: outputs, final states and every gradient, on every rank."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp import collectives
from hybrid_sp.kernels import chunks
from tests.support.oracle import assert_close, linear_attention_loop, softmax_attention_loop
from tests.support.ranks import run_ranks

BOUND = 1e-10
LAYOUTS = ("contiguous", "zigzag")
LENGTH = 107  # odd, and no multiple of any number of spans used here


@dataclass(frozen=True)
class Case:
    """One call of an operator. `decay` is None, "fixed", "scalar" or "vector"."""

    operator: str = "linear"
    decay: str | None = None
    groups: int = 4
    heads: int = 4
    normalize: bool = False
    causal: bool = True
    states: bool = False
    layout: str = "contiguous"
    overlap: bool = True
    seed: int = 0

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Leaves of the whole sequence, the same on every rank."""
        make = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        B, L, H, G, K, V = 2, LENGTH, self.heads, self.groups, 6, 6 if self.operator == "softmax" else 5
        x = {"q": normal(B, L, H if self.operator == "softmax" else G, K), "k": normal(B, L, G, K)}
        x["v"] = normal(B, L, G if self.operator == "softmax" else H, V)
        if self.normalize:
            x["q"], x["k"] = x["q"].abs(), x["k"].abs()
        decays = {"fixed": (H,), "scalar": (B, L, H), "vector": (B, L, H, K)}
        if self.decay is not None:
            x["log_decay"] = -0.3 * normal(*decays[self.decay]).abs()
        if self.states:
            x["initial"] = normal(B, H, K, V)
            if self.normalize:
                x["initial_z"] = normal(B, H, K).abs()
        wide = torch.promote_types(dtype, torch.float32)  # states and decays
        return {name: value.to(dtype if name in "qkv" else wide) for name, value in x.items()}

    def call(self, x: dict[str, Tensor], shard: hsp.Shard | None) -> tuple[Tensor, list[Tensor]]:
        """Output and final states of the operator under test."""
        if self.operator == "softmax":
            return hsp.softmax_attention(x["q"], x["k"], x["v"], shard=shard, causal=self.causal), []
        initial = x.get("initial")
        out = hsp.linear_attention(
            x["q"],
            x["k"],
            x["v"],
            log_decay=x.get("log_decay"),
            shard=shard,
            causal=self.causal,
            normalize=self.normalize,
            initial_state=(initial, x["initial_z"]) if "initial_z" in x else initial,
            return_final_state=self.states,
        )
        if not self.states:
            return out, []
        return out[0], list(out[1]) if self.normalize else [out[1]]

    def loop(self, x: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same by the token loop."""
        if self.operator == "softmax":
            return softmax_attention_loop(x["q"], x["k"], x["v"], causal=self.causal), []
        initial = x.get("initial")
        o, final = linear_attention_loop(
            x["q"],
            x["k"],
            x["v"],
            x.get("log_decay"),
            causal=self.causal,
            normalize=self.normalize,
            initial_state=(initial, x["initial_z"]) if "initial_z" in x else initial,
        )
        finals = list(final) if isinstance(final, tuple) else [final]
        return o, finals if self.states else []


def weights(like: Tensor, seed: int) -> Tensor:
    """Gradient that the loss gives an output."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like.dtype)


def truth(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Outputs and gradients of the whole sequence by the token loop, in fp64 on inputs rounded to dtype."""
    x = {name: value.double().requires_grad_() for name, value in case.inputs(dtype).items()}
    o, finals = case.loop(x)
    outputs = {"o": o, **{f"final{i}": final for i, final in enumerate(finals)}}
    given = [weights(outputs["o"], 0).to(dtype), *(weights(x, i + 1) for i, x in enumerate(finals))]
    grads = torch.autograd.grad(list(outputs.values()), list(x.values()), [w.double() for w in given])
    return {k: v.detach() for k, v in outputs.items()} | {f"d{n}": g for n, g in zip(x, grads, strict=True)}


REPLICATED = ("initial", "initial_z")


def measured(case: Case, group: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What this rank computes, with gradients of replicated inputs summed over ranks."""
    sp = hsp.SequenceParallel(group, layout=case.layout, overlap=case.overlap, check=True)
    shard = sp.shard(LENGTH)

    def cut(name: str) -> bool:
        return name not in REPLICATED and not (name == "log_decay" and case.decay == "fixed")

    x = {name: shard.take(v) if cut(name) else v for name, v in case.inputs(dtype).items()}
    x = {name: value.detach().requires_grad_() for name, value in x.items()}
    o, finals = case.call(x, shard)
    whole = o.new_empty(o.shape[0], LENGTH, *o.shape[2:])
    loss = (o * shard.take(weights(whole, 0))).sum(dtype=torch.promote_types(dtype, torch.float32))
    for i, final in enumerate(finals):  # every rank gives the final state a different part of its gradient
        parts = torch.arange(1, sp.size + 1, dtype=final.dtype)
        loss = loss + (final * weights(final, i + 1)).sum() * parts[sp.rank] / parts.sum()
    grads = torch.autograd.grad(loss, list(x.values()))
    got = {"o": o.detach(), **{f"final{i}": final.detach() for i, final in enumerate(finals)}}
    for name, grad in zip(x, grads, strict=True):
        got[f"d{name}"] = grad if cut(name) else collectives.all_reduce(grad.clone(), group, tag="test")
    return got


def check_cases(group: Any, cases: list[tuple[Case, dict[str, Tensor]]], chunk: int, rows: int) -> int:
    """On every rank: all cases, all tensors."""
    default = chunks.CHUNK, chunks.BLOCK_ROWS
    chunks.CHUNK, chunks.BLOCK_ROWS = chunk, rows
    try:
        for case, want in cases:
            shard = hsp.SequenceParallel(group, layout=case.layout).shard(LENGTH)
            got = measured(case, group)
            assert got.keys() == want.keys()
            for name, value in got.items():
                expected = want[name]
                if value.shape != expected.shape:
                    expected = shard.take(expected)
                assert_close(f"{case} {name} on rank {collectives.rank(group)}", value, expected, BOUND)
    finally:
        chunks.CHUNK, chunks.BLOCK_ROWS = default
    return len(cases)


def linear_cases() -> list[Case]:
    cases = [Case(decay=d, states=s) for d in (None, "fixed", "scalar", "vector") for s in (False, True)]
    cases += [Case(decay=d, groups=2, normalize=n, states=n) for d in (None, "scalar", "vector") for n in (True, False)]
    cases += [Case(causal=False), Case(causal=False, normalize=True, groups=1)]
    return cases


def softmax_cases() -> list[Case]:
    kinds = itertools.product((4, 2, 1), (True, False))
    return [Case(operator="softmax", groups=groups, causal=causal) for groups, causal in kinds]


@pytest.fixture(scope="module")
def wanted() -> dict[Case, dict[str, Tensor]]:
    return {case: truth(case) for case in linear_cases() + softmax_cases()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_parity_fp64(world: int, layout: str, wanted: dict[Case, dict[str, Tensor]]) -> None:
    cases = [(replace(case, layout=layout), want) for case, want in wanted.items()]
    assert run_ranks(check_cases, world, cases, 8, 64, deadline=120) == [len(cases)] * world


@pytest.mark.parametrize("chunk", [4, 64])
def test_chunk_size_does_not_matter(chunk: int, wanted: dict[Case, dict[str, Tensor]]) -> None:
    cases = [(replace(case, layout="zigzag"), want) for case, want in wanted.items() if case.operator == "linear"]
    run_ranks(check_cases, 2, cases, chunk, 8192, deadline=120)


def check_overlap_is_bit_equal(group: Any) -> None:
    for case in linear_cases() + softmax_cases():
        with_overlap, without = (measured(replace(case, overlap=on, layout="zigzag"), group) for on in (True, False))
        for name in with_overlap:
            assert torch.equal(with_overlap[name], without[name]), f"{case} {name} on rank {collectives.rank(group)}"


def test_overlap_off_is_bit_equal() -> None:
    run_ranks(check_overlap_is_bit_equal, 2, deadline=120)


RMS_BOUND = {torch.float32: 5e-6, torch.bfloat16: 5e-3}


def check_low_precision(group: Any, cases: list[tuple[Case, list[dict[str, Tensor]]]], dtype: torch.dtype) -> None:
    """Errors against fp64 on the same rounded inputs: small on one device, and on P ranks at most twice as large. rms
    over a tensor and over seeds, since the rounding of a few numbers alone is a lottery."""
    for case, truths in cases:
        shard = hsp.SequenceParallel(group, layout=case.layout).shard(LENGTH)
        errors: dict[str, Tensor] = {}
        for seed, want in enumerate(truths):
            seeded = replace(case, seed=seed)
            alone, here = measured(seeded, None, dtype), measured(seeded, group, dtype)
            for name, got in here.items():
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
            where = (
                f"{case} {dtype} {name} on rank {collectives.rank(group)}: {here_rms:.2e}, one device {alone_rms:.2e}"
            )
            assert name not in ("o", "dq", "dk", "dv") or alone_rms <= RMS_BOUND[dtype], where
            assert here_rms <= 2 * alone_rms, where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    cases = [case for case in linear_cases() + softmax_cases() if case.states or not case.causal or case.groups == 2]
    truths = [[truth(replace(case, seed=seed), dtype) for seed in range(4)] for case in cases]
    for world, layout in ((2, "zigzag"), (4, "contiguous")):
        given = [(replace(case, layout=layout), want) for case, want in zip(cases, truths, strict=True)]
        run_ranks(check_low_precision, world, given, dtype, deadline=120)
