"""The learning rate by step, and AdamW on master copies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from layers.config import ModelConfig
from layers.model import HybridLM
from recipes.config import OptimConfig
from recipes.optim import Optimizer, learning_rate


def test_warm_up_then_cosine() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup=4)
    rates = [learning_rate(optim, step, 24) for step in range(1, 25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[13] == pytest.approx(0.55)  # half way
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))


def test_constant() -> None:
    optim = OptimConfig(lr=2.0, warmup=2, schedule="constant")
    assert [learning_rate(optim, step, 5) for step in range(1, 6)] == [1.0, 2.0, 2.0, 2.0, 2.0]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.RMSNorm(3)).to(dtype)


def test_only_matrices_decay() -> None:
    model = small_model()
    optimizer = Optimizer(model, OptimConfig(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.ndim == 2 else 1.0)), name


def test_one_step_is_adamw_as_it_is_written() -> None:
    model = small_model(torch.float64)
    optimizer = Optimizer(model, OptimConfig(weight_decay=0.0, betas=(0.9, 0.95)))
    weight = model[0].weight
    w, m, v = weight.detach().clone(), torch.zeros(3, 3).double(), torch.zeros(3, 3).double()
    for step in (1, 2, 3):
        gradient = torch.full((3, 3), 0.1 * step).double()
        weight.grad = gradient.clone()
        optimizer.step(0.01)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        w -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    assert torch.allclose(weight, w, rtol=1e-12)


def test_clipping_is_by_the_global_norm() -> None:
    model = small_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    numbers = sum(p.numel() for p in model.parameters())
    optimizer = Optimizer(model, OptimConfig(clip=1.0))
    assert float(optimizer.clip()) == pytest.approx(2 * math.sqrt(numbers))
    assert math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())) == pytest.approx(1.0, rel=1e-4)
    unclipped = Optimizer(model, OptimConfig(clip=None))
    assert float(unclipped.clip()) == pytest.approx(1.0, rel=1e-4) == float(unclipped.clip())


def test_narrow_weights_have_wide_masters() -> None:
    """A change far below bfloat16's spacing is lost in the weights and kept in the masters, and so adds up."""
    model = small_model(torch.bfloat16)
    optimizer = Optimizer(model, OptimConfig(weight_decay=0.0))
    weight, before = model[0].weight, model[0].weight.detach().clone()
    master_before = optimizer.masters["0.weight"].detach().clone()
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.collect()
    assert weight.grad is None and torch.equal(optimizer.masters["0.weight"].grad, torch.full((3, 3), 2.0))
    optimizer.step(1e-6)
    assert torch.equal(weight, before)
    assert torch.allclose(optimizer.masters["0.weight"], master_before - 1e-6, atol=1e-8)
    for _ in range(200):
        for p in optimizer.masters.values():
            p.grad = torch.ones_like(p)
        optimizer.step(1e-4)
    assert not torch.equal(weight, before) and weight.dtype == torch.bfloat16


def test_parameters_that_stay_wide_are_their_own_masters() -> None:
    """Of a bf16 model gates are fp32: they get their own gradients, one clipping with all, and no rounding."""
    model = HybridLM(ModelConfig(dim=16, depth=2, heads=2, pattern=["mamba2", "gla"])).bfloat16()
    optimizer = Optimizer(model, OptimConfig(weight_decay=0.5, clip=1.0))
    own = {name for name, p in model.named_parameters() if optimizer.masters[name] is p}
    assert own == {name for name, p in model.named_parameters() if p.dtype == torch.float32} and len(own) == 3
    assert {p.dtype for p in optimizer.masters.values()} == {torch.float32}
    before = {name: model.get_parameter(name).detach().clone() for name in own}
    for _ in range(2):
        model.loss(torch.arange(20)[None], torch.arange(1, 21)[None])[0].backward()
        optimizer.collect()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in optimizer.masters.values()))
    assert all(p.grad is not None and p.grad.any() for p in optimizer.masters.values())
    assert float(optimizer.clip()) == pytest.approx(norm, rel=1e-5)
    optimizer.step(1e-5)
    for name in own:
        moved = (model.get_parameter(name) - before[name]).abs()
        assert 0 < moved.max() <= 1.1e-5, f"{name}: a step far below bfloat16's spacing, and no decay of vectors"
    for name, p in model.named_parameters():
        assert torch.equal(p, optimizer.masters[name].to(p.dtype)) and p.grad is None, name


def test_state_shares_memory_with_the_optimiser() -> None:
    optimizer = Optimizer(small_model(), OptimConfig())
    state = optimizer.state()
    state["model"]["0.weight"].fill_(7.0)
    state["optimizer"]["0.weight.exp_avg"].fill_(8.0)
    weight = optimizer.masters["0.weight"]
    assert weight[0, 0] == 7.0 and optimizer.adamw.state[weight]["exp_avg"][0, 0] == 8.0
