"""Gated recurrences with a decay of every channel, from their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.layers.formulas.parts import CONTEXT, Weights, convolved, heads, projected, rms_norm
from tests.support.oracle import linear_attention_loop


def hgrn2(w: Weights, x: Tensor, lower_bound: str = "learned") -> Tensor:
    q, logits, v = projected(w, x, (4, 6), (4, 6), (4, 6))
    bound = {
        "learned": lambda: torch.sigmoid(w["rule.bound"]).unflatten(0, (4, 6)),
        "fixed": lambda: torch.tensor(CONTEXT.layer / CONTEXT.depth),
        "none": lambda: torch.tensor(0.0),
    }[lower_bound]()
    forget = bound + (1 - bound) * torch.sigmoid(logits)
    o, _ = linear_attention_loop(q * torch.sigmoid(q), 1 - forget, v, forget.log())
    return rms_norm(o.flatten(2), w["norm.weight"]) @ w["output.weight"].T


def short_conv(w: Weights, x: Tensor) -> Tensor:
    B, C, u = (x @ rows.T for rows in w["project.weight"].split([24, 24, 24]))
    return (C * convolved(B * u, w["conv.weight"])) @ w["output.weight"].T


def rwkv6(w: Weights, x: Tensor, shift_rank: int = 32, decay_rank: int = 64) -> Tensor:
    before = torch.zeros_like(x)
    before[:, 1:] = x[:, :-1]
    first = x * (1 - w["mix_first"]) + before * w["mix_first"]
    mixed = {}
    for i, name in enumerate(["w", "k", "v", "r", "g"]):
        share = w["mix"].chunk(5)[i] + torch.tanh(first @ w["mix_down"][:, i]) @ w["mix_up"][i]
        mixed[name] = x * (1 - share) + before * share
    r = heads(mixed["r"], w["receptance.weight"], 4)
    k = heads(mixed["k"], w["key.weight"], 4)
    v = heads(mixed["v"], w["value.weight"], 4)
    g = mixed["g"] @ w["gate.weight"].T
    log_decay = -torch.exp(w["decay"] + torch.tanh(mixed["w"] @ w["decay_down"]) @ w["decay_up"])
    o, _ = linear_attention_loop(
        r, k, v, log_decay.unflatten(-1, (4, 6)), scale=1.0, bonus=w["bonus"].unflatten(0, (4, 6))
    )
    centred = o - o.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 6 * CONTEXT.norm_eps).sqrt()
    o = normed.flatten(2) * w["norm_weight"] + w["norm_bias"]
    return (o * g * torch.sigmoid(g)) @ w["output.weight"].T
