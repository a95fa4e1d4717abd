"""The rotary position embedding (RoPE, arXiv 2104.09864), which pairs channel i with channel i + K/2, and YaRN."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hybrid_sp.shard import Shard
from hybrid_sp.transfer import to_device
from layers.cache import LayerCache, require_one_device


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretch rotary positions to `factor` times the length of earlier training, by YaRN (arXiv 2309.00071).

    A pair that turns beta_fast times or more within `original_length` tokens keeps its angles. One that turns beta_slow
    times or less turns `factor` times more slowly. Between them the share of the slow angle grows linearly with the
    number of the pair. That is the authors' code; their paper has it grow with the number of turns. Rotated channels of
    queries and keys are also multiplied by 1 + 0.1 ln(factor).
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def check(self) -> None:
        """Raise ValueError unless it can stretch positions."""
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it must be at least 1")
        if self.original_length < 1:
            raise ValueError(f"rope_scaling.original_length is {self.original_length}; it must be at least 1")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"rope_scaling.beta_slow {self.beta_slow} and beta_fast {self.beta_fast} must rise from 0, such as 1 "
                "and 32"
            )

    @property
    def temperature(self) -> float:
        """The factor of queries and keys."""
        return 1 + 0.1 * math.log(self.factor)

    def slow_share(self, base: float, pairs_K: Tensor) -> Tensor:
        """Return the share of the slow angle in the angle of each pair, for pairs numbered from 0."""
        half = len(pairs_K)

        def pair(turns: float) -> float:
            return half * math.log(self.original_length / (2 * math.pi * turns)) / math.log(base)

        first, last = max(math.floor(pair(self.beta_fast)), 0), min(math.ceil(pair(self.beta_slow)), 2 * half - 1)
        return ((pairs_K - first) / max(last - first, 0.001)).clamp(0, 1)


def token_positions(x_BTD: Tensor, shard: Shard | None, cache: LayerCache | None) -> Tensor:
    """Return the position [T] of each local token: the shard's, or the next ones after those in the cache."""
    require_one_device(shard, cache)
    if shard is not None:
        return shard.positions if x_BTD.device.type == "cpu" else shard.once(_positions, x_BTD.device)
    start = 0 if cache is None else cache.position
    return torch.arange(start, start + x_BTD.shape[1], device=x_BTD.device)


def _positions(shard: Shard, device: torch.device) -> Tensor:
    return to_device(shard.positions, device)


def rotate(
    positions_T: Tensor,
    base: float,
    *tensors_BTHK: Tensor,
    channels: int | None = None,
    scaling: RopeScaling | None = None,
) -> list[Tensor]:
    """Turn each pair of channels i and i + K/2 of every tensor by the angle position * base**(-2i/K).

    K is even. It counts the first `channels`, or with None all; others stay as they are. `scaling` changes the angles.
    Angles are fp64, because fp32 is off by 0.06 rad at position one million. The rotation is computed in the
    dtype of the tensors, at least fp32, and rounded once.
    """
    half = (tensors_BTHK[0].shape[-1] if channels is None else channels) // 2
    wide = torch.promote_types(tensors_BTHK[0].dtype, torch.float32)
    cos, sin = _cos_sin(positions_T, base, half, wide, scaling)
    rotated = []
    for x_BTHK in tensors_BTHK:
        low, high, rest = x_BTHK.tensor_split([half, 2 * half], dim=-1)
        turned = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_BTHK.dtype)
        rotated.append(torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned)
    return rotated


# What `_cos_sin` has made, while the positions live: all layers rotate by the same positions of a shard.
_made: MutableMapping[Tensor, dict[Any, tuple[Tensor, Tensor]]] = WeakTensorKeyDictionary()


def _cos_sin(
    positions_T: Tensor, base: float, half: int, dtype: torch.dtype, scaling: RopeScaling | None
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines [T,1,half] of all angles."""

    def make() -> tuple[Tensor, Tensor]:
        pairs_K = torch.arange(half, device=positions_T.device, dtype=torch.float64)
        speed_K, temperature = base ** (-pairs_K / half), 1.0
        if scaling is not None:
            speed_K = speed_K * (1 - scaling.slow_share(base, pairs_K) * (1 - 1 / scaling.factor))
            temperature = scaling.temperature
        angles_T1K = torch.outer(positions_T.double(), speed_K)[:, None]
        return (angles_T1K.cos() * temperature).to(dtype), (angles_T1K.sin() * temperature).to(dtype)

    if torch.compiler.is_compiling():
        return make()
    made, key = _made.setdefault(positions_T, {}), (base, half, dtype, scaling)
    if key not in made:
        with torch.inference_mode(False):  # a later training step may save them for backward
            made[key] = make()
    return made[key]
