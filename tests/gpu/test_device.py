"""Every backend on a CUDA device: `make gpu-test`. Skipped by name where there is none."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from analysis.bench.device import allow_any_triton
from layers.registry import MIXERS
from tests.gpu import attention, linear, memcheck
from tests.gpu.linear import Problem

CUDA = torch.device("cuda")
DECAYS = (None, "fixed", "scalar", "vector")
WIDTHS = ((64, 64), (128, 128), (256, 256), (64, 128), (37, 53))
DOCUMENTS = (0, 1, 64, 65, 200, 517)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="no CUDA device, or Triton is set to interpret (make gpu-test)",
)


@pytest.fixture(scope="module", autouse=True)
def device_settings() -> Iterator[None]:
    """Fresh memory stays filled with NaN; what torch itself cannot do deterministically on CUDA only warns."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    print(allow_any_triton())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(True)


def widths() -> list[Problem]:
    found = [Problem(decay=decay, key=K, value=V) for decay in DECAYS for K, V in WIDTHS]
    for dtype in (torch.float16, torch.float32):
        found += [Problem(decay=decay, key=128, value=128, dtype=dtype) for decay in DECAYS]
        found += [Problem(decay=decay, key=37, value=53, dtype=dtype) for decay in ("scalar", "vector")]
    return found


def forms() -> list[Problem]:
    found = [Problem(decay=decay, states=True, spans=spans) for decay in DECAYS for spans in (1, 2)]
    found += [Problem(decay=decay, batch=1, documents=DOCUMENTS, states=True, spans=2) for decay in DECAYS]
    found += [Problem(decay=decay, groups=2) for decay in (None, "scalar", "vector")]
    found += [Problem(decay=decay, bonus=True, states=decay == "vector") for decay in (None, "scalar", "vector")]
    found += [Problem(decay=decay, normalize=True, groups=2, states=True) for decay in (None, "scalar", "vector")]
    found += [Problem(decay="vector", length=length) for length in (1, 63, 64, 65)]
    found += [Problem(decay="scalar", length=length) for length in (1, 63, 64, 65, 4097)]
    return found


@pytest.mark.parametrize("problem", [*widths(), *forms()], ids=str)
def test_linear_attention_is_right(problem: Problem) -> None:
    linear.check_errors(problem, "triton", CUDA)


def test_auto_is_our_kernels_here() -> None:
    problem = Problem()
    x = problem.inputs(0, CUDA)
    assert torch.equal(problem.call(x, "auto")["o"], problem.call(x, "triton")["o"])


PLAIN = [Problem(decay=decay, key=128, value=128) for decay in DECAYS]


@pytest.mark.parametrize("problem", [*PLAIN, Problem(decay="vector", bonus=True)], ids=str)
@pytest.mark.parametrize("check", [linear.check_leak, linear.check_determinism, linear.check_strides])
def test_no_leak_the_same_bits_any_strides(check: object, problem: Problem) -> None:
    assert callable(check)
    check(problem, "triton", CUDA)


@pytest.mark.parametrize("decay", DECAYS)
def test_documents_do_not_leak(decay: str | None) -> None:
    linear.check_documents(Problem(decay=decay, batch=1, documents=DOCUMENTS, spans=2), "triton", CUDA)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_strong_decays(decay: str, dtype: torch.dtype) -> None:
    linear.check_strong_decays(Problem(decay=decay, dtype=dtype), "triton", CUDA)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_pieces_are_the_whole(decay: str | None, pieces: int) -> None:
    linear.check_pieces(Problem(decay=decay), "triton", CUDA, pieces)
    linear.check_pieces(Problem(decay=decay, dtype=torch.float32), "triton", CUDA, pieces)


def test_a_group_of_one_rank() -> None:
    linear.check_group_of_one(Problem(decay="vector"), "triton", CUDA)


def test_far_addresses() -> None:
    """1,048,641 tokens of 16 heads of 128: more than 2^31 numbers in each of q, k, v and o."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    far = Problem(decay="scalar", key=128, value=128, heads=16, groups=16, batch=1, length=2**20 + 65)
    linear.check_far_addresses(far, "triton", CUDA, tail=256)
    linear.check_far_addresses(replace(far, batch=2, length=2**19 + 33), "triton", CUDA, tail=256)


@pytest.mark.parametrize("decay", [None, "scalar", "vector"])
def test_the_host_waits_for_nothing(decay: str | None) -> None:
    """Once warm, forward and backward launch without a synchronisation."""
    problem = Problem(decay=decay)
    x = {name: value.requires_grad_() for name, value in problem.inputs(0, CUDA).items()}
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            o = problem.call(x, "triton")["o"]
            torch.autograd.grad(o, list(x.values()), torch.ones_like(o))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", attention.SOFTMAX)
@pytest.mark.parametrize("backend", ["torch", "flash_attn"])
def test_softmax_attention_is_right(kind: str, backend: str) -> None:
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    for dtype in (torch.bfloat16, torch.float16):
        for width in (64, 128):
            attention.check_softmax(kind, backend, CUDA, dtype, 517, width)


@pytest.mark.parametrize("decay", [None, "scalar", "vector"])
def test_the_delta_rule_is_right(decay: str | None) -> None:
    if importlib.util.find_spec("fla") is None:
        pytest.skip("fla-core is not installed")
    with attention.two_configurations():
        for width in (64, 128):
            attention.check_delta(decay, "fla", CUDA, torch.bfloat16, width, 517)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_mixers_are_those_of_the_cpu(name: str) -> None:
    """In fp32, against fp64: whatever backend it takes, and whatever it keeps on a device."""
    attention.check_mixer(name, CUDA, length=261, dim=256)


def test_experts_are_those_of_the_cpu() -> None:
    attention.check_experts(CUDA, length=261, dim=256)


def test_memcheck_is_clean() -> None:
    code, told = memcheck.watched(seconds=300)
    if code == memcheck.LACKING:
        pytest.skip(told)
    assert code == 0, told[-6000:]
