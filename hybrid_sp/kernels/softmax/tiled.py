"""The softmax attention of one device under a mask given as a list of tiles (`tiles.py`). Each tile is one call of a
fused kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attend import attend, attend_backward, merge
from .tiles import Tile


def attend_tiles(
    todo: list[Tile], o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str
) -> None:
    """Merge the attention of these tiles into o and lse, in place."""
    for tile in todo:
        q_, k_, v_ = (_load(tile, x) for x in (tile.of_queries(q), tile.of_keys(k), tile.of_keys(v)))
        found = attend(q_, k_, v_, tile.kind != "full", scale, backend)
        o_part, lse_part = tile.of_queries(o), tile.of_queries(lse)
        o_new, lse_new = (_store(tile, x, o_part.shape[:2]) for x in found)
        if not tile.fresh:
            o_new, lse_new = merge(o_part, lse_part, o_new, lse_new)
        o_part.copy_(o_new)
        lse_part.copy_(lse_new)


def attend_tiles_backward(
    todo: list[Tile],
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
    """Add the gradients of these tiles to dq, dk and dv, in place, from o and lse of the whole."""
    for tile in todo:
        do_, q_, o_, lse_ = (_load(tile, tile.of_queries(x)) for x in (do, q, o, lse))
        k_, v_ = (_load(tile, tile.of_keys(x)) for x in (k, v))
        found = attend_backward(do_, q_, k_, v_, o_, lse_, tile.kind != "full", scale, backend)
        outputs = tile.of_queries(grads[0]), tile.of_keys(grads[1]), tile.of_keys(grads[2])
        for x, grad in zip(outputs, found, strict=True):
            x += _store(tile, grad, x.shape[:2])
        del found, grad  # before those of the next tile are made


def _load(tile: Tile, x: Tensor) -> Tensor:
    """Flatten [B,repeats,T,...] to a batch for the kernel. A flipped tile is read backwards, which makes it a causal
    square."""
    x = x.flatten(0, 1)
    return x.flip(1) if tile.kind == "flipped" else x


def _store(tile: Tile, x: Tensor, batch: torch.Size) -> Tensor:
    """Undo `_load` for an output of the kernel, to [B,repeats,T,...]."""
    return (x.flip(1) if tile.kind == "flipped" else x).unflatten(0, batch)
