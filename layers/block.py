"""The block: a mixer moves information between tokens, a feed-forward part works on each; both add to the residual."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hybrid_sp.shard import Shard
from layers.cache import LayerCache
from layers.cost import Cost, count_parameters
from layers.mlp import MLPS
from layers.moe import MoE, MoEConfig, Routing
from layers.registry import BlockContext, Mixer, MixerSpec


class FeedForward(NamedTuple):
    """Describe the feed-forward part of a block: the inner width and activation of an MLP, or a mixture of experts."""

    width: int
    activation: str = "swiglu"
    moe: MoEConfig | None = None

    def build(self, context: BlockContext) -> nn.Module:
        """Build the part with weights that nobody has drawn yet."""
        if self.moe is not None:
            return MoE(self.moe, context.dim, self.width, context.depth)
        return MLPS[self.activation](context.dim, self.width)

    def cost(self, context: BlockContext) -> Cost:
        """Count the cost of the part without the memory of its weights."""
        with torch.device("meta"):
            built = self.build(context)
        return built.cost() if isinstance(built, MoE) else count_parameters(built)


class Block(nn.Module):
    """Compute x + mixer(RMSNorm(x)), then x + feed_forward(RMSNorm(x)). A block may lack one of the two.

    The norms are torch's. They compute in fp32 (fp64 for fp64) and round once to the dtype of their input.
    """

    def __init__(self, spec: MixerSpec | None, context: BlockContext, feed_forward: FeedForward | None) -> None:
        super().__init__()
        self.mixer: Mixer | None = None
        self.mlp: nn.Module | None = None
        if spec is not None:
            self.mixer_norm = nn.RMSNorm(context.dim, eps=context.norm_eps)
            self.mixer = spec.build(context)
        if feed_forward is not None:
            self.mlp_norm = nn.RMSNorm(context.dim, eps=context.norm_eps)
            self.mlp = feed_forward.build(context)

    def init_cache(self, batch: int) -> LayerCache:
        """Make the cache of the mixer before the first token; without a mixer it counts tokens alone."""
        return LayerCache(position=0, tensors=()) if self.mixer is None else self.mixer.init_cache(batch)

    def forward(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None, Routing | None]:
        """Return the residual stream, the new cache if one is given, and the statistics of the router with experts."""
        routing = None
        if self.mixer is not None:
            mixed_BTD, cache = self.mixer(self.mixer_norm(x_BTD), shard, cache)
            x_BTD = x_BTD + mixed_BTD
        elif cache is not None:
            cache = cache.extended(x_BTD.shape[1])
        if self.mlp is not None:
            y_BTD = self.mlp(self.mlp_norm(x_BTD))
            if isinstance(self.mlp, MoE):
                y_BTD, routing = y_BTD
            x_BTD = x_BTD + y_BTD
        return x_BTD, cache, routing
