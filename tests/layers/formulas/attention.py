"""Linear attention with and without decay, and softmax attention, from their weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.layers.formulas.parts import Weights, heads, projected, rms_norm, turned
from tests.support.oracle import linear_attention_loop, softmax_attention_loop


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


def softmax(w: Weights, x: Tensor) -> Tensor:
    q_rows, k_rows, v_rows = w["project.linear.weight"].split([24, 12, 12])
    o = softmax_attention_loop(turned(heads(x, q_rows, 4)), turned(heads(x, k_rows, 2)), heads(x, v_rows, 2))
    return o.flatten(2) @ w["output.weight"].T
