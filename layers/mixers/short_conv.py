"""The gated short convolution of LFM2 (arXiv 2511.23404): a mixer that reads the last few tokens and has no state.

    y_t = (C_t * sum over j < W of w_j * (B_(t-j) * u_(t-j))) W_o        B_t, C_t, u_t = x_t W_B, x_t W_C, x_t W_u

All products but those with matrices are per channel. W is `conv`. Before the first token of a document B * u is 0.
Between ranks travel the W - 1 tokens before each span.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from hybrid_sp.shard import Shard
from layers.cache import LayerCache, require_one_device
from layers.conv import ShortConv
from layers.cost import Cost, count_parameters
from layers.registry import BlockContext, MixerSpec, at_least, register


@register("short_conv")
@dataclass(frozen=True, kw_only=True)
class ShortConvSpec(MixerSpec):
    conv: int = 3  # tokens that the convolution reads

    def __post_init__(self) -> None:
        at_least(1, "short_conv", conv=self.conv)

    def build(self, context: BlockContext) -> ShortConvMixer:
        return ShortConvMixer(context.dim, self.conv)


class ShortConvMixer(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConv(dim, width, activation=None)
        self.output = nn.Linear(dim, dim, bias=False)

    def init_cache(self, batch: int) -> LayerCache:
        """Make the cache before the first token: inputs of the convolution, which are zero."""
        return LayerCache(position=0, tensors=(self.conv.init_state(batch),))

    def forward(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        require_one_device(shard, cache)
        B_BTD, C_BTD, u_BTD = self.project(x_BTD).chunk(3, dim=-1)
        mixed_BTD, recent = self.conv(B_BTD * u_BTD, shard, None if cache is None else cache.tensors[0])
        if cache is not None:
            assert recent is not None
            cache = cache.extended(x_BTD.shape[1], recent)
        return self.output(C_BTD * mixed_BTD), cache

    def cost(self) -> Cost:
        """Add the cost of the convolution to the mixer's parameters."""
        return count_parameters(self) + Cost(halos=(self.conv.halo,))
