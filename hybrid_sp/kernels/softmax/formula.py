"""The softmax attention by its formula, a block of rows at a time. It serves CUDA in fp64, and other devices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..heads import repeat_heads, sum_groups
from .layout import Grads, wide

ROWS = 512  # of the scores at a time


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    q, k, v = (wide(x).transpose(1, 2) for x in (q, k, v))
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for rows, scores in _scores(q, k, causal, scale):
        lse[:, :, rows] = scores.logsumexp(-1)
        o[:, :, rows] = scores.softmax(-1) @ v
    return o.transpose(1, 2), lse.transpose(1, 2)


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float) -> Grads:
    """Compute dq, dk, dv from dS = P * (dP - the part of dP along P). o and do give that part without the keys of other
    blocks."""
    groups, k, v = k.shape[2], repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    do, q, k, v, o = (wide(x).transpose(1, 2) for x in (do, q, k, v, o))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    along = (do * o).sum(-1, keepdim=True)
    for rows, scores in _scores(q, k, causal, scale):
        P = (scores - lse.transpose(1, 2)[:, :, rows, None]).exp()
        dS = P * (do[:, :, rows] @ v.mT - along[:, :, rows]) * scale
        dq[:, :, rows] = dS @ k
        dk += dS.mT @ q[:, :, rows]
        dv += P.mT @ do[:, :, rows]
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return dq, sum_groups(dk, groups), sum_groups(dv, groups)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield scale * q k^T [B,H,t,S] for ROWS queries at a time, with -inf where a causal mask hides a key. q and k are
    [B,H,T,D]."""
    for first in range(0, q.shape[2], ROWS):
        rows = slice(first, min(first + ROWS, q.shape[2]))
        scores = q[:, :, rows] @ k.mT * scale
        if causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(first + 1)
            scores = scores.masked_fill(later, float("-inf"))
        yield rows, scores
