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


def scalar_decay(w: Weights, x: Tensor, owner: str = "rule") -> Tensor:
    step = softplus(x @ w[f"{owner}.steps.project.weight"].T + w[f"{owner}.steps.dt_bias"])
    return -torch.exp(w[f"{owner}.steps.A_log"]) * step


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


def gated_delta_product(
    w: Weights,
    x: Tensor,
    steps: int = 2,
    expand_k: float = 0.75,
    expand_v: float = 1.5,
    key_heads: int = 4,
    negative_eigenvalues: bool = True,
) -> Tensor:
    """Token by token, and within a token write by write."""
    K, V = int(6 * expand_k), int(6 * expand_v)
    sizes = (key_heads, K), (steps * key_heads, K), (steps * 4, V), (4, V)
    q, k, v, gate = projected(w, x, *sizes)
    q, k = (length_one(y).unflatten(2, (-1, key_heads)).repeat_interleave(4 // key_heads, dim=3) for y in (q, k))
    v = v.unflatten(2, (steps, 4))
    beta = (2 if negative_eigenvalues else 1) * torch.sigmoid(x @ w["rule.write.beta.weight"].T).unflatten(
        -1, (steps, 4)
    )
    decay = scalar_decay(w, x, "rule.write").exp()
    S = x.new_zeros(len(x), 4, K, V)
    outputs = []
    for t in range(x.shape[1]):
        S = decay[:, t, :, None, None] * S
        for j in range(steps):
            key, share = k[:, t, j, :, :, None], beta[:, t, j, :, None, None]
            S = S - share * key @ (key.mT @ S) + share * key @ v[:, t, j, :, None]
        outputs.append((q[:, t, 0, :, None] @ S)[:, :, 0] / K**0.5)
    o = torch.stack(outputs, dim=1)
    return (rms_norm(o, w["norm.weight"]) * silu(gate)).flatten(2) @ w["output.weight"].T


def comba(w: Weights, x: Tensor, expand_k: float = 0.75, expand_v: float = 1.5) -> Tensor:
    """With the matrix a - c b k^T k of every token, as the paper writes it."""
    K, V = int(6 * expand_k), int(6 * expand_v)
    q, k, v, gate = projected(w, x, (4, K), (4, K), (4, V), (4, V))
    q, k = length_one(q), length_one(k)
    a = scalar_decay(w, x, "rule.delta").exp()
    b = torch.sigmoid(x @ w["rule.delta.beta.weight"].T)
    c = 1 / (1 + torch.exp(-w["rule.feedback"]))
    S = x.new_zeros(len(x), 4, K, V)
    outputs = []
    for t in range(x.shape[1]):
        key, write = k[:, t, :, :, None], b[:, t, :, None, None]
        transition = a[:, t, :, None, None] * torch.eye(K, dtype=x.dtype) - c[:, None, None] * write * key @ key.mT
        S = transition @ S + write * key @ v[:, t, :, None]
        read = q[:, t] - w["rule.correction"][:, None] * k[:, t]
        outputs.append((read[:, :, None] @ S)[:, :, 0] / K**0.5)
    o = torch.stack(outputs, dim=1)
    return (rms_norm(o, w["norm.weight"]) * torch.sigmoid(gate)).flatten(2) @ w["output.weight"].T


def comba_by_errors(w: Weights, x: Tensor, expand_k: float = 0.75, expand_v: float = 1.5) -> Tensor:
    """Another loop: control by what the state answers to a key, one head and sequence after another."""
    K, V = int(6 * expand_k), int(6 * expand_v)
    q, k, v, gate = projected(w, x, (4, K), (4, K), (4, V), (4, V))
    log_decay, strength = scalar_decay(w, x, "rule.delta"), torch.sigmoid(w["rule.feedback"])
    beta = torch.sigmoid(x @ w["rule.delta.beta.weight"].T)
    rows = []
    for row in range(len(x)):
        heads = []
        for h in range(4):
            S, answers = x.new_zeros(V, K), []
            for t in range(x.shape[1]):
                key, query = length_one(k[row, t, h]), length_one(q[row, t, h])
                error = v[row, t, h] - strength[h] * (S @ key)
                S = torch.exp(log_decay[row, t, h]) * S + beta[row, t, h] * torch.outer(error, key)
                answers.append(S @ query - w["rule.correction"][h] * (S @ key))
            heads.append(rms_norm(torch.stack(answers) / K**0.5, w["norm.weight"]))
        rows.append(torch.stack(heads, dim=1))
    return (torch.stack(rows) * torch.sigmoid(gate)).flatten(2) @ w["output.weight"].T
