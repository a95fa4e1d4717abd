"""Operators that read a few tokens before their own, which other ranks may hold."""

from __future__ import annotations

from torch import Tensor

from .layout import Shard


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    shard: Shard | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution of x [B,T,D] with weight [D,W]. Not built yet: it raises."""
    raise NotImplementedError("short_conv is not built yet")


def token_shift(
    x: Tensor, *, shard: Shard | None = None, initial_state: Tensor | None = None, return_final_state: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The previous token of each token of x [B,T,D]. Not built yet: it raises."""
    raise NotImplementedError("token_shift is not built yet")
