"""Multi-head latent attention from its weights: every head's keys and values made from the latents, one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.layers.formulas.parts import Weights, heads, rms_norm, turned
from tests.support.oracle import softmax_attention_loop


def mla(
    w: Weights,
    x: Tensor,
    head_dim: int = 6,
    value_dim: int = 0,
    rope_dim: int = 4,
    rank: int = 0,
    q_rank: int = 0,
    rotate: bool = True,
    gate: str = "none",
) -> Tensor:
    value, rank = value_dim or head_dim, rank or 4 * head_dim
    turn = turned if rotate else (lambda z: z)
    if q_rank:
        low = rms_norm(x @ w["q.0.weight"].T, w["q.1.weight"])
        q = heads(low, w["q.2.weight"], 4)
    else:
        q = heads(x, w["q.weight"], 4)
    q = torch.cat([q[..., :head_dim], turn(q[..., head_dim:])], -1)
    latent = rms_norm(x @ w["down.weight"][:rank].T, w["norm.weight"])
    shared = turn((x @ w["down.weight"][rank:].T).unsqueeze(2))
    made = heads(latent, w["up.weight"], 4)
    k = torch.cat([made[..., :head_dim], shared.repeat(1, 1, 4, 1)], -1)
    o = softmax_attention_loop(q, k, made[..., head_dim : head_dim + value])
    if gate != "none":
        o = o / (1 + torch.exp(-heads(x, w["gate.weight"], 4)))
    return o.flatten(2) @ w["output.weight"].T
