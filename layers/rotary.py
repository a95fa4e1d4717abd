"""The rotary position embedding (RoPE, arXiv 2104.09864), which pairs channel i with channel i + K/2."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hybrid_sp.shard import Shard
from hybrid_sp.transfer import to_device
from layers.cache import LayerCache, require_one_device


def token_positions(x_BTD: Tensor, shard: Shard | None, cache: LayerCache | None) -> Tensor:
    """Return the position [T] of each local token: the shard's, or the next ones after those in the cache."""
    require_one_device(shard, cache)
    if shard is not None:
        return shard.positions if x_BTD.device.type == "cpu" else shard.once(_positions, x_BTD.device)
    start = 0 if cache is None else cache.position
    return torch.arange(start, start + x_BTD.shape[1], device=x_BTD.device)


def _positions(shard: Shard, device: torch.device) -> Tensor:
    return to_device(shard.positions, device)


def rotate(positions_T: Tensor, base: float, *tensors_BTHK: Tensor) -> list[Tensor]:
    """Turn each pair of channels i and i + K/2 of every tensor by the angle position * base**(-2i/K).

    K is even. Angles are fp64, because fp32 is off by 0.06 rad at position one million. The rotation is computed in the
    dtype of the tensors, at least fp32, and rounded once.
    """
    half = tensors_BTHK[0].shape[-1] // 2
    wide = torch.promote_types(tensors_BTHK[0].dtype, torch.float32)
    cos, sin = _cos_sin(positions_T, base, half, wide)
    rotated = []
    for x_BTHK in tensors_BTHK:
        low, high = x_BTHK.chunk(2, dim=-1)
        rotated.append(torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_BTHK.dtype))
    return rotated


# What `_cos_sin` has made, while the positions live: all layers rotate by the same positions of a shard.
_made: MutableMapping[Tensor, dict[tuple[float, int, torch.dtype], tuple[Tensor, Tensor]]] = WeakTensorKeyDictionary()


def _cos_sin(positions_T: Tensor, base: float, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines [T,1,half] of all angles."""

    def make() -> tuple[Tensor, Tensor]:
        exponents = torch.arange(half, device=positions_T.device, dtype=torch.float64) / half
        angles_T1K = torch.outer(positions_T.double(), base**-exponents)[:, None]
        return angles_T1K.cos().to(dtype), angles_T1K.sin().to(dtype)

    if torch.compiler.is_compiling():
        return make()
    made, key = _made.setdefault(positions_T, {}), (base, half, dtype)
    if key not in made:
        with torch.inference_mode(False):  # a later training step may save them for backward
            made[key] = make()
    return made[key]
