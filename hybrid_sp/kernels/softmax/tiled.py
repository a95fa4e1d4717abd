"""Softmax attention of one device under a mask that is a list of parts (`tiles.py`), each a call of a fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .attend import attend, attend_backward, merge
from .tiles import Part


def attend_parts(
    todo: list[Part], o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str
) -> None:
    """Merge the attention of these parts into o and lse, in place."""
    for part in todo:
        seen = [_load(part, x) for x in (part.of_queries(q), part.of_keys(k), part.of_keys(v))]
        found = attend(seen[0], seen[1], seen[2], part.kind != "full", scale, backend)
        o_part, lse_part = part.of_queries(o), part.of_queries(lse)
        o_new, lse_new = (_store(part, x, o_part.shape[:2]) for x in found)
        if not part.fresh:
            o_new, lse_new = merge(o_part, lse_part, o_new, lse_new)
        o_part.copy_(o_new)
        lse_part.copy_(lse_new)


def attend_parts_backward(
    todo: list[Part],
    grads: tuple[Tensor, Tensor, Tensor],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    backend: str,
) -> None:
    """Add the gradients of these parts to dq, dk and dv, in place, from o and lse of the whole."""
    for part in todo:
        do_, q_, o_, lse_ = (_load(part, part.of_queries(x)) for x in (do, q, o, lse))
        k_, v_ = (_load(part, part.of_keys(x)) for x in (k, v))
        found = attend_backward(do_, q_, k_, v_, o_, lse_, part.kind != "full", scale, backend)
        outputs = part.of_queries(grads[0]), part.of_keys(grads[1]), part.of_keys(grads[2])
        for x, grad in zip(outputs, found, strict=True):
            x += _store(part, grad, x.shape[:2])
        del found, grad  # before those of the next part are made


def _load(part: Part, x: Tensor) -> Tensor:
    """[B,repeats,T,...] as a batch for the kernel; a flipped part backwards, which makes a causal square of it."""
    x = x.flatten(0, 1)
    return x.flip(1) if part.kind == "flipped" else x


def _store(part: Part, x: Tensor, batch: torch.Size) -> Tensor:
    """Back from the kernel, [B,repeats,T,...]."""
    return (x.flip(1) if part.kind == "flipped" else x).unflatten(0, batch)
