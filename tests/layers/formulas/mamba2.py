"""Mamba-2, from its weights, as the state space model that its paper writes."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.layers.formulas.parts import CONTEXT, Weights, projected, silu, softplus


def mamba2(w: Weights, u: Tensor, expand: float = 2.0, state: int = 128, groups: int = 1, norm: bool = True) -> Tensor:
    inner = int(24 * expand)
    C, B, x, z = projected(w, u, (groups, state), (groups, state), (4, inner // 4), (4, inner // 4))
    dt = softplus(u @ w["rule.steps.project.weight"].T + w["rule.steps.dt_bias"])
    A = -torch.exp(w["rule.steps.A_log"])
    width = inner // 4
    columns = []
    for head in range(4):
        group = head // (4 // groups)
        h = u.new_zeros(len(u), state, width)
        outputs = []
        for t in range(u.shape[1]):
            step = dt[:, t, head, None, None]
            h = torch.exp(A[head] * step) * h + step * B[:, t, group, :, None] * x[:, t, head, None, :]
            outputs.append((C[:, t, group, :, None] * h).sum(1) + w["rule.D"][head] * x[:, t, head])
        columns.append(torch.stack(outputs, dim=1))
    y = torch.cat(columns, dim=-1) * silu(z.flatten(2))
    if not norm:
        return y @ w["output.weight"].T
    parts = []
    for part, weight in zip(y.chunk(groups, dim=-1), w["norm.weight"].chunk(groups), strict=True):
        parts.append(part / (part.square().mean(-1, keepdim=True) + CONTEXT.norm_eps).sqrt() * weight)
    return torch.cat(parts, dim=-1) @ w["output.weight"].T
