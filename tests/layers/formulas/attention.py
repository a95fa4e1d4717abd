"""Linear attention with and without decay, and softmax attention, from their weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.layers.formulas.parts import Weights, projected, rms_norm, turned
from tests.support.oracle import linear_attention_loop


def linear(w: Weights, x: Tensor, feature_map: str = "identity", normalize: bool = False) -> Tensor:
    feature = {
        "identity": lambda z: z,
        "elu+1": lambda z: torch.where(z > 0, z + 1, z.exp()),
        "relu": lambda z: z.clamp(min=0),
        "softmax": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),
    }[feature_map]
    q, k, v = projected(w, x, (4, 6), (4, 6), (4, 6))
    o, _ = linear_attention_loop(feature(q), feature(k), v, normalize=normalize)
    if not normalize:
        o = rms_norm(o, w["norm.weight"])
    return o.flatten(2) @ w["output.weight"].T


def lightning(w: Weights, x: Tensor) -> Tensor:
    q, k, v, g = projected(w, x, (4, 6), (4, 6), (4, 6), (4, 6))
    log_decay = torch.tensor([-(8 * h / 4) * (1 - 1 / 4) for h in range(4)], dtype=x.dtype)
    o, _ = linear_attention_loop(q * torch.sigmoid(q), k * torch.sigmoid(k), v, log_decay)
    y = rms_norm(o.flatten(2), w["norm.weight"]) / (1 + torch.exp(-g.flatten(2)))
    return y @ w["output.weight"].T


def retention(w: Weights, x: Tensor) -> Tensor:
    q, k, v, g = projected(w, x, (4, 6), (4, 6), (4, 12), (4, 12))
    log_decay = torch.tensor([math.log(1 - 2 ** (-5 - h)) for h in range(4)], dtype=x.dtype)
    o, _ = linear_attention_loop(turned(q), turned(k), v, log_decay)
    return (rms_norm(o, w["norm.weight"]) * g * torch.sigmoid(g)).flatten(2) @ w["output.weight"].T


def gla(w: Weights, x: Tensor, expand_k: float = 0.5, temperature: float = 16.0) -> Tensor:
    width = int(6 * expand_k)
    q, k, v, g = projected(w, x, (4, width), (4, width), (4, 6), (4, 6))
    logits = x @ w["rule.low_rank.0.weight"].T @ w["rule.low_rank.1.weight"].T + w["rule.low_rank.1.bias"]
    decay = torch.sigmoid(logits) ** (1 / temperature)
    o, _ = linear_attention_loop(q, k, v, decay.log().unflatten(-1, (4, -1)))
    return (rms_norm(o, w["norm.weight"]) * g * torch.sigmoid(g)).flatten(2) @ w["output.weight"].T


def softmax(
    w: Weights,
    x: Tensor,
    window: int | None = None,
    head_dim: int = 6,
    qk_norm: bool = False,
    rope_fraction: float = 1.0,
    gate: str = "none",
    sinks: bool = False,
) -> Tensor:
    """One query of a head after another, which is shown only the keys that it may see."""
    gates = {"none": [], "head": [(4, 1)], "channel": [(4, head_dim)]}[gate]
    q, k, v, *g = projected(w, x, (4, head_dim), (2, head_dim), (2, head_dim), *gates)
    if qk_norm:
        q, k = rms_norm(q, w["q_norm.weight"]), rms_norm(k, w["k_norm.weight"])
    rotated = int(head_dim * rope_fraction)
    q, k = (torch.cat([turned(y[..., :rotated]), y[..., rotated:]], -1) for y in (q, k))
    outputs = []
    for t in range(x.shape[1]):
        seen = slice(max(0, t - (window or t + 1) + 1), t + 1)
        for h in range(4):
            weights = torch.exp(torch.einsum("bk,bsk->bs", q[:, t, h], k[:, seen, h // 2]) / head_dim**0.5)
            total = weights.sum(-1, keepdim=True) + (w["sinks"][h].exp() if sinks else 0)
            outputs.append(torch.einsum("bs,bsv->bv", weights / total, v[:, seen, h // 2]))
    o = torch.stack(outputs, dim=1).unflatten(1, (-1, 4))
    if g:
        o = o / (1 + torch.exp(-g[0]))
    return o.flatten(2) @ w["output.weight"].T


def sliding_window(w: Weights, x: Tensor, window: int = 128, **options: Any) -> Tensor:
    return softmax(w, x, window=window, **options)
