"""Sliding-window attention, from its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.layers.formulas.parts import Weights, heads, turned


def sliding_window(w: Weights, x: Tensor, window: int = 128) -> Tensor:
    """One query after another, which is shown only the keys of its window."""
    q_rows, k_rows, v_rows = w["project.linear.weight"].split([24, 12, 12])
    q, k, v = turned(heads(x, q_rows, 4)), turned(heads(x, k_rows, 2)), heads(x, v_rows, 2)
    outputs = []
    for t in range(x.shape[1]):
        seen = slice(max(0, t - window + 1), t + 1)
        for h in range(4):
            scores = torch.einsum("bk,bsk->bs", q[:, t, h], k[:, seen, h // 2]) / 6**0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            outputs.append(torch.einsum("bs,bsv->bv", weights, v[:, seen, h // 2]))
    return torch.stack(outputs, dim=1).unflatten(1, (-1, 4)).flatten(2) @ w["output.weight"].T
