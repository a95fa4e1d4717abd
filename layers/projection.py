"""The projection from the residual stream to queries, keys, values and gates, cut into heads."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

Sizes = Sequence[tuple[int, int]]  # (heads, width) of tensors that share the channel dim, in order


def channels(sizes: Sizes) -> int:
    """Count the channels that tensors of these sizes have together."""
    return sum(heads * width for heads, width in sizes)


def cut_heads(x_BTC: Tensor, sizes: Sizes) -> list[Tensor]:
    """Cut x_BTC into one [B, T, heads, width] tensor per pair (heads, width), in the order of the channels."""
    cuts = x_BTC.split([heads * width for heads, width in sizes], dim=-1)
    return [rearrange(cut, "b t (h d) -> b t h d", h=heads) for cut, (heads, _) in zip(cuts, sizes, strict=True)]


class HeadProjection(nn.Module):
    """Project x_BTD to one [B, T, heads, width] tensor per pair (heads, width), in one matrix product."""

    def __init__(self, dim: int, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.linear = nn.Linear(dim, channels(sizes), bias=False)

    def forward(self, x_BTD: Tensor) -> list[Tensor]:
        return cut_heads(self.linear(x_BTD), self.sizes)
