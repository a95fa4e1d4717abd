"""The checks of `test_device.py` themselves, on a CPU: our kernels in Triton's interpreter, at tiny sizes."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from analysis.bench.device import allow_any_triton
from analysis.bench.gpu.interception import in_place_of_launch
from hybrid_sp import backends
from tests.gpu import attention, linear, memcheck, ptxas, syncs
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


def test_mixers_and_experts() -> None:
    for name in ("linear", "softmax", "mla"):
        attention.check_mixer(name, CPU, length=37, dim=32)
    attention.check_experts(CPU, length=37, dim=32)


@pytest.mark.slow
@interpreted
def test_what_memcheck_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [
        replace(p, length=37, key=7, value=5, documents=DOCUMENTS if p.documents else None) for p in memcheck.problems()
    ]
    monkeypatch.setattr(memcheck, "problems", lambda: [p for p in tiny if p.decay == "scalar"])
    memcheck.main(CPU)


@interpreted
def test_a_kernel_that_two_ptxas_make_differently_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the kernels that only read what it wrote; and rounding is told apart from what is wrong."""
    problem = replace(TINY, length=20, heads=1, groups=1)
    monkeypatch.setattr(ptxas, "problems", lambda: [problem])
    ptxas.run_problem(problem, CPU)  # the first call also tries the interpreter
    right = ptxas.run_problem(problem, CPU)
    assert {"summary", "fold", "scan"} <= {step.kernel.partition("_")[0] for step in right.steps}
    assert ptxas.differences(problem, right, ptxas.run_problem(problem, CPU)) == ([], [])

    def compare(factor: float) -> tuple[bool, str]:
        def off(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
            launch(kernel, grid, *args, **options)
            if kernel.fn.__name__ == "fold_kernel" and not options["REVERSE"]:
                args[3].mul_(factor).add_(factor - 1)

        with monkeypatch.context() as patch:
            with in_place_of_launch(off) as launch:
                other = ptxas.run_problem(problem, CPU)
            dumps = {"ptxas": [right], "ptxas-blackwell": [other]}
            patch.setattr(ptxas, "dump_all", lambda folder, name, path: dumps[name])
            fine = ptxas.compare_kernels(tmp_path, dict.fromkeys(dumps, Path()))
        told = capsys.readouterr().out
        assert (tmp_path / "report.md").read_text().splitlines()[0] == told.splitlines()[-1]
        assert told.count("other bits in tensors") == told.count("fold_kernel") == 1
        return fine, told

    fine, told = compare(1 + 2**-12)
    assert fine and "which is rounding" in told and ", 0 more than rounding" in told
    fine, told = compare(1.5)
    assert not fine and "which is rounding" not in told.splitlines()[0]


def test_tests_that_one_ptxas_alone_fails_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "tests.xml"
    cases = '<testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"><skipped/></testcase>'
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    bad = ptxas.read_tests(report)
    assert bad == {"a": "passed", "b": "failed", "c": "skipped"}
    assert not ptxas.compare_tests({"ptxas": bad, "ptxas-blackwell": bad | {"b": "passed"}})
    assert capsys.readouterr().out.splitlines()[-2:] == ["which tests fail depends on ptxas:", "  b"]
    assert ptxas.compare_tests({"ptxas": {"a": "passed"}})
    assert ptxas.read_tests(tmp_path / "none.xml") == {"pytest": "failed"}


def test_every_stop_of_a_host_is_told_and_none_is_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the mode of CUDA: while it is on, one mixer stops the host."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    plain = syncs.step

    def step(block: Any, x: Tensor, shard: hsp.Shard) -> list[Tensor]:
        if modes[-1] == "error" and type(block.mixer).__name__ != "SoftmaxMixer":
            raise RuntimeError("called a synchronizing CUDA operation")
        return plain(block, x, shard)

    monkeypatch.setattr(syncs, "step", step)
    found = syncs.stops(None, CPU, ["linear", "softmax"], 24, 32)
    assert found.keys() == {"linear, whole", "linear, packed"} and modes == ["default", *["error", "default"] * 4]
    assert syncs.main() == syncs.LACKING


def test_a_triton_that_is_refused_is_run_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Hopper alone; the checks find out what it does."""
    assert allow_any_triton() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    monkeypatch.setattr(backends, "TRITON_ON_HOPPER", backends.TRITON_ON_HOPPER)
    assert "refuses" in allow_any_triton()
    backends.check_triton(torch.device("cuda"))
    assert allow_any_triton() == ""


def test_memcheck_says_what_the_sanitizer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert memcheck.watched() == (memcheck.LACKING, "compute-sanitizer is not on the PATH")
    for line, code in (("exit 9", 9), ("echo Device not supported; exit 1", memcheck.LACKING), ("exit 0", 0)):
        tool.write_text(f"#!/bin/sh\n{line}\n")
        tool.chmod(0o755)
        assert memcheck.watched()[0] == code


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
