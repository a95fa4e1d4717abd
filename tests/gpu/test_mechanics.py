"""The checks of `test_device.py` themselves, on a CPU: our kernels in Triton's interpreter, at tiny sizes."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import pytest
import torch

import hybrid_sp as hsp
from tests.gpu import attention, linear, memcheck
from tests.gpu.linear import Problem
from tests.support import interpreter
from tests.support.tiers import tiered

CPU = torch.device("cpu")
TINY = Problem(key=16, value=16, heads=2, groups=2, batch=1, length=37)
DOCUMENTS = (0, 1, 20, 37)

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="triton is not installed, or not set to interpret",
)


@pytest.fixture(scope="module", autouse=True)
def as_on_a_device() -> None:
    if importlib.util.find_spec("triton") is not None:
        interpreter.mend()


@interpreted
@pytest.mark.parametrize(
    ("decay", "dtype"),
    tiered([("fixed", torch.float16), ("scalar", torch.float32)], [(None, torch.bfloat16), ("vector", torch.bfloat16)]),
    ids=str,
)
def test_errors(decay: str | None, dtype: torch.dtype) -> None:
    linear.check_errors(replace(TINY, decay=decay, dtype=dtype, states=True, spans=2), "triton", CPU, seeds=2)


@pytest.mark.slow
@interpreted
def test_leak_documents_determinism_strides_and_strong_decays() -> None:
    linear.check_leak(TINY, "triton", CPU)
    linear.check_documents(replace(TINY, documents=DOCUMENTS, spans=2), "triton", CPU)
    linear.check_determinism(TINY, "triton", CPU)
    linear.check_strides(TINY, "triton", CPU)
    linear.check_strong_decays(replace(TINY, dtype=torch.float32), "triton", CPU)


@interpreted
def test_pieces_a_group_of_one_and_the_tail_of_a_long_sequence() -> None:
    linear.check_pieces(replace(TINY, dtype=torch.float32), "triton", CPU, 3)
    linear.check_group_of_one(TINY, "triton", CPU)
    linear.check_far_addresses(replace(TINY, length=400, heads=1, groups=1), "triton", CPU, tail=80)


def test_softmax_and_delta() -> None:
    for kind in attention.SOFTMAX:
        attention.check_softmax(kind, "torch", CPU, torch.bfloat16, 61, 16)
    for decay in (None, "scalar", "vector"):
        attention.check_delta(decay, "torch", CPU, torch.bfloat16, 16, 61)


def test_mixers() -> None:
    for name in ("linear", "softmax"):
        attention.check_mixer(name, CPU, length=37, dim=32)


@pytest.mark.slow
@interpreted
def test_what_memcheck_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [
        replace(p, length=37, key=7, value=5, documents=DOCUMENTS if p.documents else None) for p in memcheck.problems()
    ]
    monkeypatch.setattr(memcheck, "problems", lambda: [p for p in tiny if p.decay == "scalar"])
    memcheck.main(CPU)


def test_the_checks_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that reads one token too many, rounds too much, or depends on something else is found."""
    right = hsp.linear_attention

    def fails(check: object, wrong: object, problem: Problem) -> None:
        assert callable(check)
        monkeypatch.setattr(hsp, "linear_attention", wrong)
        with pytest.raises(AssertionError, match=str(problem)):
            check(problem, "other", CPU)

    def other(change: object) -> object:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str, **options: object) -> object:
            if backend == "torch":
                return right(q, k, v, backend=backend, **options)
            assert callable(change)
            return change(right(q, k, v, backend="torch", **options))

        return call

    fails(linear.check_leak, other(lambda o: o + o.roll(-1, 1)), TINY)
    fails(linear.check_errors, other(lambda o: o * (1 + 2**-6)), TINY)
    fails(linear.check_determinism, other(lambda o: o + 0.1 * torch.rand_like(o)), TINY)
    fails(linear.check_documents, other(lambda o: o + o.mean(1, keepdim=True)), replace(TINY, documents=DOCUMENTS))
    fails(linear.check_strong_decays, other(lambda o: o * 1.05), replace(TINY, dtype=torch.float32))
