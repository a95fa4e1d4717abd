"""The multi-head latent attention mixer, MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    c_t = RMSNorm(x_t W_c)    r_t = R(x_t W_r)    k_t,h = [c_t W_k,h, r_t]    v_t,h = c_t W_v,h
    y_t = (sum over s <= t of softmax_s(q_t,h . k_s,h / sqrt(N + R)) v_s,h * gate_t) W_o

The latent c has `rank` numbers. R rotates by the angles of the token's position; r has `rope_dim` numbers, and so has
the last part of every query. Without `rotate` nothing is rotated, as in Kimi Linear (arXiv 2510.26692). With `q_rank`
queries come from a latent of their own, q = RMSNorm(x W_a) W_b. The gate is sigmoid(x W_g), one number for each head or
for each channel of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

import hybrid_sp as hsp
from hybrid_sp.shard import Shard
from layers.cache import LayerCache
from layers.cost import Attention, Cost, count_parameters
from layers.registry import BlockContext, MixerSpec, at_least, register
from layers.rotary import rotate, token_positions

GATES = ("none", "head", "channel")


@register("mla")
@dataclass(frozen=True, kw_only=True)
class MLASpec(MixerSpec):
    letter: ClassVar[str] = "N"
    head_dim: int = 0  # of keys without the rotated part; 0: dim / heads
    value_dim: int = 0  # 0: head_dim
    rope_dim: int = 0  # of the part of keys that all heads share; 0: half of head_dim
    rank: int = 0  # of the latent of keys and values; 0: four times head_dim
    q_rank: int = 0  # of the latent of queries; 0: none
    rotate: bool = True
    gate: str = "none"  # none, head or channel

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("head_dim", "value_dim", "rope_dim", "rank", "q_rank")}
        at_least(0, "mla", **sizes)
        if self.gate not in GATES:
            raise ValueError(f"gate of mla is {self.gate!r}; it must be one of {', '.join(GATES)}")

    def build(self, context: BlockContext) -> LatentMixer:
        return LatentMixer(self, context)


class LatentMixer(nn.Module):
    """Attend from every token to all tokens up to itself, by keys and values that are made from latents."""

    def __init__(self, spec: MLASpec, context: BlockContext) -> None:
        super().__init__()
        heads = context.heads
        key = spec.head_dim or context.width()
        value, shared, rank = spec.value_dim or key, spec.rope_dim or -(-key // 4) * 2, spec.rank or 4 * key
        if spec.rotate and shared % 2:
            raise ValueError(f"rope_dim of mla is {shared}, which rotary embedding cannot pair; make it even")
        self.heads, self.key, self.value, self.shared, self.rank = heads, key, value, shared, rank
        self.rope_base, self.rope_scaling = context.rope_base if spec.rotate else None, context.rope_scaling
        self.backend = context.backend_of("latent_attention")
        queries = heads * (key + shared)
        self.q: nn.Module = nn.Linear(context.dim, queries, bias=False)
        if spec.q_rank:
            self.q = nn.Sequential(
                nn.Linear(context.dim, spec.q_rank, bias=False),
                nn.RMSNorm(spec.q_rank, eps=context.norm_eps),
                nn.Linear(spec.q_rank, queries, bias=False),
            )
        self.down = nn.Linear(context.dim, rank + shared, bias=False)
        self.norm = nn.RMSNorm(rank, eps=context.norm_eps)
        self.up = nn.Linear(rank, heads * (key + value), bias=False)
        gates = {"none": 0, "head": heads, "channel": heads * value}[spec.gate]
        self.gate = nn.Linear(context.dim, gates, bias=False) if gates else None
        self.output = nn.Linear(heads * value, context.dim, bias=False)

    def init_cache(self, batch: int) -> LayerCache:
        """Make a cache without latents. It keeps `rank` + `rope_dim` numbers of each token."""
        return LayerCache(position=0, tensors=(self.output.weight.new_zeros(batch, 0, self.rank + self.shared),))

    def forward(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        tokens = x_BTD.shape[1]
        first = cache is None or cache.position == 0
        if not first and tokens != 1:
            raise ValueError(
                f"got {tokens} tokens and a cache that has read some: latent attention then takes one token at a time; "
                "give all tokens of a prompt at once, to an empty cache"
            )
        q_BTHK, latent_BTC, rope_BTR, w_k, w_v = self._inputs(x_BTD, token_positions(x_BTD, shard, cache))
        if cache is not None:
            kept_BSC = torch.cat([cache.tensors[0], torch.cat([latent_BTC, rope_BTR], -1)], 1)
            cache = cache.extended(tokens, kept_BSC)
            if not first:
                latent_BTC, rope_BTR = kept_BSC.split([self.rank, self.shared], -1)
        # With a cache the only query is the last token, which sees all latents.
        o_BTHV = hsp.latent_attention(
            q_BTHK, latent_BTC, rope_BTR, w_k, w_v, shard=shard, causal=first, backend=self.backend
        )
        return self._output(x_BTD, o_BTHV), cache

    def start(self, x_BTD: Tensor, shard: Shard | None) -> Callable[[], Tensor]:
        """Compute and send what other ranks need, and return a function that computes the output."""
        inputs = self._inputs(x_BTD, token_positions(x_BTD, shard, None))
        started = hsp.latent_attention.start(*inputs, shard=shard, causal=True, backend=self.backend)
        return lambda: self._output(x_BTD, started.finish())

    def _inputs(self, x_BTD: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Make queries and latents, rotate the parts that carry positions, and add the weights that expand a latent."""
        q_BTHK = rearrange(self.q(x_BTD), "b t (h k) -> b t h k", h=self.heads)
        latent_BTC, rope_BTR = self.down(x_BTD).split([self.rank, self.shared], -1)
        latent_BTC = self.norm(latent_BTC)
        if self.rope_base is not None:
            plain_BTHN, turned_BTHR = q_BTHK.split([self.key, self.shared], -1)
            turned_BTHR, rope_BT1R = rotate(
                positions_T, self.rope_base, turned_BTHR, rope_BTR.unsqueeze(2), scaling=self.rope_scaling
            )
            q_BTHK, rope_BTR = torch.cat([plain_BTHN, turned_BTHR], -1), rope_BT1R.squeeze(2)
        w_k, w_v = self.up.weight.unflatten(0, (self.heads, -1)).split([self.key, self.value], 1)
        return q_BTHK, latent_BTC, rope_BTR, w_k, w_v

    def _output(self, x_BTD: Tensor, o_BTHV: Tensor) -> Tensor:
        """Multiply by the gate, and write to the residual stream."""
        if self.gate is not None:
            o_BTHV = o_BTHV * torch.sigmoid(rearrange(self.gate(x_BTD), "b t (h v) -> b t h v", h=self.heads))
        return self.output(rearrange(o_BTHV, "b t h v -> b t (h v)"))

    def cost(self) -> Cost:
        """Add the cost of attention to the mixer's parameters. The latent travels, and decoding keeps it."""
        attention = Attention(
            heads=self.heads,
            kv_heads=self.heads,
            width=self.key + self.shared,
            value=self.value,
            latent=self.rank + self.shared,
        )
        return count_parameters(self) + Cost(attention=(attention,))
