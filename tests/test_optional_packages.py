"""With none of triton, fla-core and flash-attn installed all is imported, and every operator and mixer trains."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import hybrid_sp as hsp
from layers import MIXERS, HybridLM, ModelConfig

ROOT = Path(__file__).parents[1]
ROOMS = ["hybrid_sp", "layers", "recipes", "analysis"]
PACKAGES = ("triton", "fla", "flash_attn")


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What went wrong in each function of CALLS, in one process that cannot import the packages."""
    code = f"""
from tests.support.packages import hide
hide{PACKAGES}
from tests import test_optional_packages as here
here.report()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def report() -> None:
    found = {}
    for call in CALLS:
        try:
            call()
            found[call.__name__] = ""
        except Exception:
            found[call.__name__] = traceback.format_exc()
    print(json.dumps(found))


def import_rooms() -> None:
    """All files but those of the kernels themselves, which lack nothing else."""
    names = [
        module.name
        for room in ROOMS
        for module in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}.")
        if not module.name.endswith("__main__")
    ]
    assert len(names) > 50
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            lacking = (error.name or "").partition(".")[0]
            assert name.startswith("hybrid_sp.kernels.gpu.") and lacking in PACKAGES, (name, error)


def train_operators(dtype: torch.dtype) -> None:
    """Forward and backward."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, dtype=dtype) / shape[-1] ** 0.5).requires_grad_()

    def check(out: Any, *leaves: Tensor) -> None:
        out.float().square().sum().backward()
        assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in leaves)

    q, k, v, x, weight = draw(1, 70, 2, 8), draw(1, 70, 2, 8), draw(1, 70, 4, 8), draw(1, 70, 6), draw(6, 4)
    beta = torch.full((1, 70, 4), 0.5, dtype=dtype)
    for shape in ((4,), (1, 70, 4), (1, 70, 4, 8)):
        g = draw(*shape)
        check(hsp.linear_attention(q, k, v, log_decay=-g.square()), q, k, v, g)
        if len(shape) > 1:
            check(hsp.delta_rule(q, k, v, beta=beta, log_decay=-g.square()), q, k, v, g)
    check(hsp.linear_attention(q, k, v), q, k, v)
    check(hsp.linear_attention(q.square(), k.square(), v, normalize=True), q, k, v)
    check(hsp.linear_attention(q, k, v, causal=False), q, k, v)
    check(hsp.delta_rule(q, k, v, beta=beta), q, k, v)
    check(hsp.softmax_attention(v, q, k), q, k, v)
    check(hsp.softmax_attention(v, q, k, window=5), q, k, v)
    check(hsp.token_shift(hsp.short_conv(x, weight, activation="silu")), x, weight)


def train_mixers(dtype: torch.dtype) -> None:
    """A model that has a block of each."""
    model = HybridLM(ModelConfig(dim=32, depth=len(MIXERS), heads=4, pattern=list(MIXERS))).to(dtype)
    tokens_BT = torch.arange(66)[None] % 7
    loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and bool(weight.grad.isfinite().all()), name


def train_all() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        train_operators(dtype)
        train_mixers(dtype)


def choose_on_a_device() -> None:
    """Tensors of a CUDA device, without numbers: what is not installed is chosen all the same, and then missed, by a
    name and a way out."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    with FakeTensorMode():
        q = torch.empty(1, 5, 2, 8, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(ImportError, match='backend="triton" needs the package triton.*or pass backend="torch"'):
            hsp.linear_attention(q, q, q)


CALLS = (import_rooms, train_all, choose_on_a_device)


@pytest.mark.parametrize("call", [call.__name__ for call in CALLS])
def test_works_without_the_packages(failures: dict[str, str], call: str) -> None:
    assert not failures[call], failures[call]
