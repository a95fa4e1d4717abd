"""Which backend a call runs on: by device, capability, dtype and widths, said once, and never by what is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hybrid_sp as hsp
from hybrid_sp import backends
from hybrid_sp.backends import BACKENDS, INSTALL, WIDEST, needs, select_backend
from hybrid_sp.ops.linear_attention import select_recurrence

ROOT = Path(__file__).parents[2]
OTHER = {operator: names[1] for operator, names in BACKENDS.items()}
ON_CUDA = {  # by "auto"
    "linear_attention": "triton",
    "delta_rule": "fla",
    "softmax_attention": "torch",
    "latent_attention": "torch",
}


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    backends._say.cache_clear()
    yield
    backends._say.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of compute capability 9.0, and no interpreter.

    Triton decides once, when kernels are imported, whether it interprets them. So they are imported before.
    """
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("hybrid_sp.kernels.gpu.linear")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def tensor(device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
    """What the choice reads of a tensor, of any device."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("operator", BACKENDS)
def test_a_device_has_its_own(operator: str) -> None:
    assert select_backend(operator, "auto", tensor(), 128, 128) == ON_CUDA[operator]
    assert select_backend(operator, OTHER[operator], tensor(), WIDEST, 1) == OTHER[operator]
    assert select_backend(operator, "torch", tensor(), 1000) == "torch"


@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize("operator", BACKENDS)
def test_a_cpu_has_torch(
    operator: str, interpret: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also under Triton's interpreter, which is slow; there `triton` runs if it is asked for."""
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert select_backend(operator, "auto", tensor("cpu"), 64) == "torch"
    assert select_backend(operator, "torch", tensor("cpu"), 64) == "torch"
    if OTHER[operator] == "triton" and interpret == "1":
        assert select_backend(operator, "triton", tensor("cpu"), 64) == "triton"
    else:
        with pytest.raises(ValueError, match=f'{operator}: backend="{OTHER[operator]}" needs a CUDA device, got cpu'):
            select_backend(operator, OTHER[operator], tensor("cpu"), 64)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("operator", BACKENDS)
@pytest.mark.parametrize(
    ("x", "width", "words"),
    [
        (tensor(dtype=torch.float64), 128, "takes .*torch.float16.*, got torch.float64"),
        (tensor(), WIDEST + 1, f"takes key and value dims up to {WIDEST}, got {WIDEST + 1}"),
        (tensor("xpu"), 128, "needs a CUDA device, got xpu"),
    ],
    ids=["dtype", "width", "device"],
)
def test_what_does_not_fit_runs_on_torch_or_is_refused(operator: str, x: Any, width: int, words: str) -> None:
    assert select_backend(operator, "auto", x, 128, width) == "torch"
    with pytest.raises(ValueError, match=f'{operator}: backend="{OTHER[operator]}" {words}; use backend="torch"'):
        select_backend(operator, OTHER[operator], x, width, 128)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("operator", BACKENDS)
def test_an_older_device(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert select_backend(operator, "auto", tensor(), 64) == "torch"
    with pytest.raises(ValueError, match="needs compute capability 8.0 or newer, got 7.5"):
        select_backend(operator, OTHER[operator], tensor(), 64)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("version", ["3.6.0", "3.7.0+git1a2b", "3.7.1", "3.10.0"])
def test_a_triton_that_miscompiles_on_hopper_is_refused_there(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fla-core refuses the same versions there, and torch 2.11 comes with one of them."""
    pytest.importorskip("triton")
    select_recurrence("triton", torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    if version in ("3.7.1", "3.10.0"):
        select_recurrence("triton", torch.device("cuda"))
    else:
        with monkeypatch.context() as patch:  # as `make gpu-test` and `make gpu-first`, which find out
            patch.setenv("HYBRID_SP_ANY_TRITON", "1")
            select_recurrence("triton", torch.device("cuda"))
        with pytest.raises(ImportError, match=f'triton 3.7.1 or newer .* got {re.escape(version)}; .*backend="torch"'):
            select_recurrence("triton", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    select_recurrence("triton", torch.device("cuda"))


@pytest.mark.usefixtures("device")
def test_fp32_runs_on_our_kernels_alone() -> None:
    x = tensor(dtype=torch.float32)
    assert {operator: select_backend(operator, "auto", x, 64) for operator in BACKENDS} == {
        "linear_attention": "triton",
        "delta_rule": "torch",
        "softmax_attention": "torch",
        "latent_attention": "torch",
    }


def test_fp64_is_refused_under_the_interpreter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="takes .*, got torch.float64"):
        select_backend("linear_attention", "triton", tensor("cpu", torch.float64), 64)


def test_an_unknown_backend() -> None:
    x = torch.zeros(1, 3, 2, 4)
    calls = [
        ("linear_attention", "cuda", lambda name: hsp.linear_attention(x, x, x, backend=name)),
        ("delta_rule", "triton", lambda name: hsp.delta_rule(x, x, x, beta=x[..., 0], backend=name)),
        ("softmax_attention", "flash", lambda name: hsp.softmax_attention(x, x, x, backend=name)),
    ]
    for operator, name, call in calls:
        with pytest.raises(
            ValueError, match=rf"{operator}: backend must be one of \('auto', 'torch', .*, got '{name}'"
        ):
            call(name)


@pytest.mark.usefixtures("device")
def test_every_choice_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        for operator in BACKENDS:
            select_backend(operator, "auto", tensor(), 128)
            select_backend(operator, OTHER[operator], tensor(), 128)  # asked for by name: nothing to say
        select_backend("linear_attention", "auto", tensor(dtype=torch.float64), 128)
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines() == [
        "hybrid_sp: linear_attention runs on triton",
        "hybrid_sp: delta_rule runs on fla",
        "hybrid_sp: softmax_attention runs on torch",
        "hybrid_sp: latent_attention runs on torch",
        "hybrid_sp: linear_attention runs on torch (triton takes torch.bfloat16, torch.float16, torch.float32, got "
        "torch.float64)",
    ]


def test_a_missing_package_is_an_error_that_says_what_to_do() -> None:
    for backend, package in INSTALL.items():
        with pytest.raises(
            ImportError, match=rf'backend="{backend}" needs .*{package}.*No module.*pass backend="torch"'
        ):
            with needs(backend):
                import no_such_package  # type: ignore[import-not-found]  # noqa: F401


def test_the_choice_does_not_depend_on_what_is_installed() -> None:
    """With every optional package hidden, the choice on a device is the same; using it says what to install."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["triton", "fla", "flash_attn"]))  # importing None raises ModuleNotFoundError
from tests.hybrid_sp.test_backends import ON_CUDA, select_backend, tensor, torch
torch.cuda.get_device_capability = lambda *_: (9, 0)
for operator, name in {ON_CUDA}.items():
    assert select_backend(operator, "auto", tensor(), 128) == name, operator
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("runs on") == len(BACKENDS)
