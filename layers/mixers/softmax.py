"""The softmax attention mixer, with rotary positions (arXiv 2104.09864) and grouped queries (GQA, arXiv 2305.13245).

    y_t = (sum over s <= t of softmax_s(R(q_t) . R(k_s) / sqrt(K)) v_s [* sigmoid(g_t)]) W_o

R rotates by the angles of the token's position. Query head h reads key-value head h // (H / kv_heads). K is the width
of a head, D / H unless `head_dim` sets it. The options, all off at first, are those of models of 2026:

    rope_fraction   the share of channels that R rotates, the first ones; at 0 there are no positions (NoPE)
    qk_norm         an RMSNorm of every head of q and of k, before the rotation (arXiv 2302.05442, as in Qwen3)
    gate            a gate on the output, per head or per channel, before W_o (arXiv 2505.06708, as in Qwen3-Next)
    sinks           a learned logit per head in the denominator of the softmax, exp(sink_h) (gpt-oss, arXiv 2508.10925)
    conv            a short convolution of q, k and v with SiLU, as in linear mixers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

import hybrid_sp as hsp
from hybrid_sp.shard import Shard
from layers.cache import LayerCache
from layers.conv import ShortConv
from layers.cost import Attention, Cost, count_parameters
from layers.projection import HeadProjection, channels, cut_heads
from layers.registry import BlockContext, MixerSpec, register, unknown
from layers.rotary import rotate, token_positions

GATES = ("none", "head", "channel")


@register("softmax")
@dataclass(frozen=True, kw_only=True)
class SoftmaxSpec(MixerSpec):
    letter: ClassVar[str] = "N"
    head_dim: int = 0  # width of a head; 0: dim / heads
    conv: int = 0  # tokens that the short convolution of queries, keys and values reads; 0: none, and no SiLU
    qk_norm: bool = False
    rope_fraction: float = 1.0
    gate: str = "none"  # none, head or channel
    sinks: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction is {self.rope_fraction:g}; it must be between 0 (NoPE) and 1")
        if self.gate not in GATES:
            raise unknown("gate", self.gate, GATES)

    def build(self, context: BlockContext) -> SoftmaxMixer:
        return SoftmaxMixer(self, context.resized(0, self.head_dim))


class SoftmaxMixer(nn.Module):
    """Attend from every token to all tokens up to itself, or to the last `window` of them."""

    def __init__(self, spec: SoftmaxSpec, context: BlockContext, window: int | None = None) -> None:
        super().__init__()
        heads, width = context.heads, context.width(even=spec.rope_fraction == 1)
        rotated = width * spec.rope_fraction
        if rotated % 2:
            raise ValueError(
                f"rope_fraction {spec.rope_fraction:g} of the {width} channels of a head is {rotated:g}, which rotary "
                "embedding cannot pair; change rope_fraction or the width of a head"
            )
        self.rotated, self.window = int(rotated), window
        self.rotate = partial(rotate, channels=self.rotated, scaling=context.rope_scaling)
        self.rope_base = context.rope_base
        self.backend = context.backend_of("softmax_attention")
        self.qkv = [(heads, width), (context.kv_heads, width), (context.kv_heads, width)]
        gate = {"none": [], "head": [(heads, 1)], "channel": [(heads, width)]}[spec.gate]
        self.project = HeadProjection(context.dim, [*self.qkv, *gate])
        self.conv = ShortConv(channels(self.qkv), spec.conv) if spec.conv else None
        self.q_norm, self.k_norm = (
            nn.RMSNorm(width, eps=context.norm_eps) if spec.qk_norm else nn.Identity() for _ in range(2)
        )
        self.sinks = nn.Parameter(torch.zeros(heads)) if spec.sinks else None
        self.output = nn.Linear(heads * width, context.dim, bias=False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the sinks to zero, as if each query saw one more key with a logit of zero."""
        if self.sinks is not None:
            self.sinks.zero_()

    def init_cache(self, batch: int) -> LayerCache:
        """Make a cache without keys and values, and with zeros for the convolution."""
        none_BTGK = self.output.weight.new_zeros(batch, 0, *self.qkv[1])
        recent = () if self.conv is None else (self.conv.init_state(batch),)
        return LayerCache(position=0, tensors=(*recent, none_BTGK, none_BTGK))

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
        (q_BTHK, k_BTGK, v_BTGK), gate_BTC, recent = self._inputs(x_BTD, positions_T, shard, cache)
        attend: Callable[..., Tensor] = partial(hsp.softmax_attention, q_BTHK, sinks=self.sinks, backend=self.backend)
        if first:
            o_BTHK = attend(k_BTGK, v_BTGK, shard=shard, window=self.window)
        if cache is not None:
            kept = slice(None if self.window is None else -self.window, None)
            pairs = zip(cache.tensors[-2:], (k_BTGK, v_BTGK), strict=True)
            k_BTGK, v_BTGK = (torch.cat(pair, dim=1)[:, kept] for pair in pairs)
            cache = cache.extended(tokens, *recent, k_BTGK, v_BTGK)
        if not first:  # the only query is the last token, which sees all keys in the cache
            o_BTHK = attend(k_BTGK, v_BTGK, causal=False)
        return self._output(o_BTHK, gate_BTC), cache

    def start(self, x_BTD: Tensor, shard: Shard | None) -> Callable[[], Tensor]:
        """Compute and send what other ranks need, and return a function that computes the output."""
        qkv, gate_BTC, _ = self._inputs(x_BTD, token_positions(x_BTD, shard, None), shard, None)
        options: Any = {"sinks": self.sinks, "backend": self.backend, "shard": shard, "window": self.window}
        started = hsp.softmax_attention.start(*qkv, **options)
        return lambda: self._output(started.finish(), gate_BTC)

    def _inputs(
        self, x_BTD: Tensor, positions_T: Tensor, shard: Shard | None, cache: LayerCache | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, list[Tensor]]:
        """Project, convolve, normalise and rotate; return q, k and v, the gate, and the convolution's last inputs."""
        projected_BTC, width = self.project.linear(x_BTD), channels(self.qkv)
        mixed_BTC, gate_BTC = projected_BTC[..., :width], projected_BTC[..., width:]
        recent = []
        if self.conv is not None:
            mixed_BTC, state = self.conv(mixed_BTC, shard, None if cache is None else cache.tensors[0])
            recent = [] if state is None else [state]
        q_BTHK, k_BTGK, v_BTGK = cut_heads(mixed_BTC, self.qkv)
        q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if self.rotated:
            q_BTHK, k_BTGK = self.rotate(positions_T, self.rope_base, q_BTHK, k_BTGK)
        return (q_BTHK, k_BTGK, v_BTGK), gate_BTC, recent

    def _output(self, o_BTHK: Tensor, gate_BTC: Tensor) -> Tensor:
        """Multiply by the gate, and write to the residual stream."""
        if gate_BTC.shape[-1]:
            o_BTHK = o_BTHK * torch.sigmoid(gate_BTC).unflatten(-1, (o_BTHK.shape[2], -1))
        return self.output(rearrange(o_BTHK, "b t h k -> b t (h k)"))

    def cost(self) -> Cost:
        """Add the cost of attention and of the convolution to the mixer's parameters."""
        (heads, width), (kv_heads, _), _ = self.qkv
        attention = Attention(heads=heads, kv_heads=kv_heads, width=width, window=self.window)
        halos = () if self.conv is None else (self.conv.halo,)
        return count_parameters(self) + Cost(attention=(attention,), halos=halos)
