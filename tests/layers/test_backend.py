"""The backend of a model: every mixer asks its operator for it, if the operator has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import hybrid_sp as hsp
from hybrid_sp.backends import BACKENDS
from layers.config import ModelConfig, block_specs
from layers.model import HybridLM
from layers.registry import MIXERS, mixer_spec
from tests.layers.formulas.parts import CONTEXT

NAMES = ["auto", *sorted({name for names in BACKENDS.values() for name in names})]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(operator, backend) of every call; they all run on torch."""
    calls: list[tuple[str, str]] = []

    def noted(operator: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, backend: str, **options: Any) -> Any:
            calls.append((operator, backend))
            return run(*args, backend="torch", **options)

        return call

    for operator in BACKENDS:
        monkeypatch.setattr(hsp, operator, noted(operator, getattr(hsp, operator)))
    return calls


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_asks_for_it(mixer: str, backend: str, asked: list[tuple[str, str]]) -> None:
    context = replace(CONTEXT, dim=32, backend=backend)
    module = mixer_spec(mixer).build(context)
    x = torch.randn(1, 1, context.dim)
    module(x)
    module(x, cache=module.init_cache(1))
    assert len(asked) == (0 if mixer == "short_conv" else 2)
    for operator, name in asked:
        assert name == (backend if backend in BACKENDS[operator] else "auto")


def test_a_model_hands_it_to_every_block(asked: list[tuple[str, str]]) -> None:
    pattern = ["gla", "delta_net", "rwkv6", "softmax"]
    model = HybridLM(ModelConfig(dim=16, depth=4, heads=2, pattern=pattern, backend="triton"))
    model(torch.zeros(1, 5, dtype=torch.long))
    triton, auto = ("linear_attention", "triton"), "auto"
    assert asked == [triton, ("delta_rule", auto), triton, ("softmax_attention", auto)]


def test_it_is_a_name_that_an_operator_knows() -> None:
    with pytest.raises(ValueError, match="unknown backend 'tritn'; did you mean 'triton'[?] known: auto, "):
        block_specs(ModelConfig(backend="tritn"))


def test_what_cannot_run_is_refused_by_the_operator() -> None:
    model = HybridLM(ModelConfig(dim=16, depth=1, heads=2, ratio="1", backend="flash_attn"))
    with pytest.raises(ValueError, match='softmax_attention: backend="flash_attn" needs a CUDA device, got cpu'):
        model(torch.zeros(1, 5, dtype=torch.long))
