"""The softmax attention mixer, with rotary positions (arXiv 2104.09864) and grouped queries (GQA, arXiv 2305.13245).

    y_t = (sum over s <= t of softmax_s(R(q_t) . R(k_s) / sqrt(D / H)) v_s) W_o

R rotates by the angles of the token's position. Query head h reads key-value head h // (H / kv_heads).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

import hybrid_sp as hsp
from hybrid_sp.shard import Shard
from layers.cache import LayerCache
from layers.cost import Attention, Cost, count_parameters
from layers.projection import HeadProjection
from layers.registry import BlockContext, MixerSpec, register
from layers.rotary import rotate, token_positions


@register("softmax")
@dataclass(frozen=True, kw_only=True)
class SoftmaxSpec(MixerSpec):
    letter: ClassVar[str] = "N"

    def build(self, context: BlockContext) -> SoftmaxMixer:
        return SoftmaxMixer(context)


class SoftmaxMixer(nn.Module):
    """Attend from every token to all tokens up to itself, or to the last `window` of them."""

    def __init__(self, context: BlockContext, window: int | None = None) -> None:
        super().__init__()
        width = context.width(even=True)
        self.rope_base, self.window = context.rope_base, window
        self.backend = context.backend_of("softmax_attention")
        self.kv_shape = (context.kv_heads, width)
        self.project = HeadProjection(context.dim, [(context.heads, width), self.kv_shape, self.kv_shape])
        self.output = nn.Linear(context.heads * width, context.dim, bias=False)

    def init_cache(self, batch: int) -> LayerCache:
        """Make a cache without keys and values."""
        none_BTGK = self.output.weight.new_zeros(batch, 0, *self.kv_shape)
        return LayerCache(position=0, tensors=(none_BTGK, none_BTGK))

    def forward(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        tokens = x_BTD.shape[1]
        first = cache is None or cache.position == 0
        if not first and tokens != 1:
            raise ValueError(
                f"got {tokens} tokens and a cache that has read some: softmax attention then takes one token at a "
                "time; give all tokens of a prompt at once, to an empty cache"
            )
        positions_T = token_positions(x_BTD, shard, cache)
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD)
        q_BTHK, k_BTGK = rotate(positions_T, self.rope_base, q_BTHK, k_BTGK)
        attend: Callable[..., Tensor] = partial(hsp.softmax_attention, q_BTHK, backend=self.backend)
        if first:
            o_BTHK = attend(k_BTGK, v_BTGK, shard=shard, window=self.window)
        if cache is not None:
            kept = slice(None if self.window is None else -self.window, None)
            pairs = zip(cache.tensors, (k_BTGK, v_BTGK), strict=True)
            k_BTGK, v_BTGK = (torch.cat(pair, dim=1)[:, kept] for pair in pairs)
            cache = cache.extended(tokens, k_BTGK, v_BTGK)
        if not first:  # the only query is the last token, which sees all keys in the cache
            o_BTHK = attend(k_BTGK, v_BTGK, causal=False)
        return self.output(rearrange(o_BTHK, "b t h k -> b t (h k)")), cache

    def cost(self) -> Cost:
        """Add the cost of attention to the mixer's parameters."""
        (heads, width), (kv_heads, _), _ = self.project.sizes
        attention = Attention(heads=heads, kv_heads=kv_heads, width=width, window=self.window)
        return count_parameters(self) + Cost(attention=(attention,))
