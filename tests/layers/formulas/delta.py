"""The delta rules, from their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.layers.formulas.parts import Weights, convolved, length_one, rms_norm, silu, softplus
from tests.support.oracle import delta_rule_loop


def mixed(w: Weights, x: Tensor, keys: int, values: int, key_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v after their convolutions, and q and k of length one; keys and values count channels."""
    sizes, counts = [keys, keys, values], (key_heads, key_heads, 4)
    rows, taps = w["project.linear.weight"][: sum(sizes)].split(sizes), w["conv.weight"].split(sizes)
    q, k, v = (silu(convolved(x @ r.T, t)).unflatten(-1, (n, -1)) for r, t, n in zip(rows, taps, counts, strict=True))
    return length_one(q), length_one(k), v


def betas(w: Weights, x: Tensor, negative_eigenvalues: bool) -> Tensor:
    return (2 if negative_eigenvalues else 1) * torch.sigmoid(x @ w["rule.beta.weight"].T)


def delta_net(
    w: Weights,
    x: Tensor,
    output_gate: bool = False,
    negative_eigenvalues: bool = False,
    expand_k: float = 1.0,
    expand_v: float = 1.0,
    conv: int = 4,
) -> Tensor:
    keys, values = int(24 * expand_k), int(24 * expand_v)
    assert w["conv.weight"].shape == (2 * keys + values, conv)
    o, _ = delta_rule_loop(*mixed(w, x, keys, values), betas(w, x, negative_eigenvalues))
    y = rms_norm(o, w["norm.weight"]).flatten(2)
    if output_gate:
        y = y * silu(x @ w["project.linear.weight"][-values:].T)
    return y @ w["output.weight"].T


def gated_delta_net(
    w: Weights,
    x: Tensor,
    expand_k: float = 0.75,
    expand_v: float = 1.5,
    key_heads: int = 4,
    negative_eigenvalues: bool = False,
) -> Tensor:
    keys, values = int(24 * expand_k) * key_heads // 4, int(24 * expand_v)
    step = softplus(x @ w["rule.steps.project.weight"].T + w["rule.steps.dt_bias"])
    log_decay = -torch.exp(w["rule.steps.A_log"]) * step
    q, k, v = mixed(w, x, keys, values, key_heads)
    o, _ = delta_rule_loop(q, k, v, betas(w, x, negative_eigenvalues), log_decay)
    gate = x @ w["project.linear.weight"][-values:].T
    return (rms_norm(o, w["norm.weight"]).flatten(2) * silu(gate)) @ w["output.weight"].T


def kda(
    w: Weights,
    x: Tensor,
    expand_k: float = 1.0,
    expand_v: float = 1.0,
    gate_rank: int = 6,
    negative_eigenvalues: bool = False,
) -> Tensor:
    assert w["rule.steps.project.0.weight"].shape == w["gate.0.weight"].shape == (gate_rank, 24)
    low_rank = x @ w["rule.steps.project.0.weight"].T @ w["rule.steps.project.1.weight"].T
    step = softplus(low_rank + w["rule.steps.dt_bias"]).unflatten(-1, (4, -1))
    log_decay = -torch.exp(w["rule.steps.A_log"])[:, None] * step
    q, k, v = mixed(w, x, int(24 * expand_k), int(24 * expand_v))
    o, _ = delta_rule_loop(q, k, v, betas(w, x, negative_eigenvalues), log_decay)
    gate = x @ w["gate.0.weight"].T @ w["gate.1.weight"].T
    return (rms_norm(o, w["norm.weight"]).flatten(2) * torch.sigmoid(gate)) @ w["output.weight"].T
