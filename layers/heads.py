"""HeadProjection: from the residual stream to queries, keys, values and gates, cut into heads."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn


class HeadProjection(nn.Module):
    """x_BTD -> one [B, T, heads, width] tensor for each pair (heads, width), all from one matrix product."""

    def __init__(self, dim: int, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.linear = nn.Linear(dim, sum(heads * width for heads, width in sizes), bias=False)

    def forward(self, x_BTD: Tensor) -> list[Tensor]:
        parts = self.linear(x_BTD).split([heads * width for heads, width in self.sizes], dim=-1)
        return [rearrange(x, "b t (h d) -> b t h d", h=h) for x, (h, _) in zip(parts, self.sizes, strict=True)]
