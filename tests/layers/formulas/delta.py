"""The delta rules, from their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.layers.formulas.parts import Weights, length_one, projected, rms_norm, silu, softplus
from tests.support.oracle import delta_rule_loop


def betas(w: Weights, x: Tensor, negative_eigenvalues: bool) -> Tensor:
    return (2 if negative_eigenvalues else 1) * torch.sigmoid(x @ w["rule.beta.weight"].T)


def delta_net(
    w: Weights,
    x: Tensor,
    output_gate: bool = False,
    negative_eigenvalues: bool = False,
    expand_k: float = 1.0,
) -> Tensor:
    key = int(6 * expand_k)
    q, k, v, *gate = projected(w, x, (4, key), (4, key), (4, 6), *([(4, 6)] if output_gate else []))
    o, _ = delta_rule_loop(length_one(q), length_one(k), v, betas(w, x, negative_eigenvalues))
    y = rms_norm(o, w["norm.weight"])
    if output_gate:
        y = y * silu(gate[0])
    return y.flatten(2) @ w["output.weight"].T


def scalar_decay(w: Weights, x: Tensor) -> Tensor:
    step = softplus(x @ w["rule.steps.project.weight"].T + w["rule.steps.dt_bias"])
    return -torch.exp(w["rule.steps.A_log"]) * step


def gated_delta_net(
    w: Weights,
    x: Tensor,
    expand_k: float = 0.75,
    expand_v: float = 1.5,
    key_heads: int = 0,
    heads: int = 4,
    head_dim: int = 0,
    negative_eigenvalues: bool = False,
) -> Tensor:
    width, key_heads = head_dim or 24 // heads, key_heads or heads
    key, value = (key_heads, int(width * expand_k)), (heads, int(width * expand_v))
    q, k, v, gate = projected(w, x, key, key, value, value)
    o, _ = delta_rule_loop(length_one(q), length_one(k), v, betas(w, x, negative_eigenvalues), scalar_decay(w, x))
    return (rms_norm(o, w["norm.weight"]) * silu(gate)).flatten(2) @ w["output.weight"].T


def kda(
    w: Weights,
    x: Tensor,
    expand_k: float = 1.0,
    gate_rank: int = 6,
    key_heads: int = 4,
    full_rank: str = "none",
    gate_lower_bound: float = 0.0,
    negative_eigenvalues: bool = False,
) -> Tensor:
    key, value = (key_heads, int(6 * expand_k)), (4, 6)
    if full_rank == "none":
        assert w["gate.0.weight"].shape == (gate_rank, 24)
        q, k, v = projected(w, x, key, key, value)
        gate = (x @ w["gate.0.weight"].T @ w["gate.1.weight"].T).unflatten(-1, value)
    else:
        q, k, v, gate = projected(w, x, key, key, value, value)
    if full_rank == "both":
        logit = x @ w["rule.steps.project.weight"].T
    else:
        assert w["rule.steps.project.0.weight"].shape == (gate_rank, 24)
        logit = x @ w["rule.steps.project.0.weight"].T @ w["rule.steps.project.1.weight"].T
    logit = (logit + w["rule.steps.dt_bias"]).unflatten(-1, (4, -1))
    rate = torch.exp(w["rule.steps.A_log"])[:, None]
    log_decay = gate_lower_bound / (1 + torch.exp(-rate * logit)) if gate_lower_bound else -rate * softplus(logit)
    o, _ = delta_rule_loop(length_one(q), length_one(k), v, betas(w, x, negative_eigenvalues), log_decay)
    return (rms_norm(o, w["norm.weight"]) * torch.sigmoid(gate)).flatten(2) @ w["output.weight"].T
