"""RecurrentMixer: what every linear mixer is made of, around the rule that makes it the one it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

import hybrid_sp as hsp
from hybrid_sp.shard import Shard
from layers.cache import LayerCache
from layers.conv import ShortConv
from layers.cost import Cost, Summary, count_parameters
from layers.norm import HeadNorm
from layers.projection import HeadProjection, Sizes, channels, cut_heads
from layers.registry import BlockContext
from layers.rotary import token_positions


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """The sizes of a linear mixer, what its recurrence is, and how its output leaves the heads.

    The state is S_BHKV, and z_BHK beside it with `normalize`. Unnormalised outputs grow with the tokens read, so these
    pass through an RMSNorm: per head with one weight [V], with `joint_norm` over all heads with a weight [H*V], or with
    `group_norm` over the heads that share a key, with a weight [H*V].
    """

    heads: int  # of values, decays and states
    key: int  # width of queries and keys as they meet the state
    value: int
    groups: int | None = None  # heads of queries and keys; value head h reads h // (heads // groups). None: heads
    features: int | None = None  # width of queries and keys as they are projected, before a feature map; None: key
    conv: int = 0  # width of the short convolution, with SiLU, that queries, keys and values pass through; 0: none
    conv_bias: bool = False
    decay: str = "none"  # of the state: none, fixed (per head), scalar (per head and token) or vector (over K as well)
    delta: bool = False  # the delta rule: what the state has under a key is replaced, not added to
    scale: float | None = None  # of what is read; None: K**-0.5
    gate: Callable[[Tensor], Tensor] | None = None  # the activation of the output gate
    gate_rank: int = 0  # channels in which the two matrices that project the gate meet; 0: it is one matrix
    gate_first: bool = False  # norm(o * gate) instead of norm(o) * gate
    normalize: bool = False
    joint_norm: bool = False
    group_norm: bool = False

    @property
    def key_heads(self) -> int:
        """Heads of queries and keys."""
        return self.heads if self.groups is None else self.groups

    @property
    def qkv(self) -> Sizes:
        """(heads, width) of the query, the key and the value, as they are projected."""
        width = self.key if self.features is None else self.features
        return [(self.key_heads, width), (self.key_heads, width), (self.heads, self.value)]

    @property
    def projected(self) -> Sizes:
        """(heads, width) of all that one matrix product projects: query, key, value, and a gate of full rank."""
        return [*self.qkv, *([(self.heads, self.value)] if self.gate and not self.gate_rank else [])]

    @property
    def norm_heads(self) -> int:
        """Heads that one output norm is taken over; 0 if the normaliser takes its place."""
        if self.normalize:
            return 0
        if self.group_norm:
            return self.heads // self.key_heads
        return self.heads if self.joint_norm else 1

    @property
    def norm_weights(self) -> int:
        """Heads whose channels have an output norm's weight of their own."""
        return self.heads if self.group_norm else self.norm_heads

    @property
    def summary(self) -> Summary:
        """What is sent of a span."""
        transition = "matrix" if self.delta else self.decay
        gates = self.delta + {"scalar": 1, "vector": self.key}.get(self.decay, 0)
        return Summary(
            heads=self.heads,
            key=self.key,
            value=self.value,
            transition=transition,
            normalize=self.normalize,
            groups=self.groups,
            gates=gates,
        )


class RecurrenceInputs(NamedTuple):
    """What a rule makes of one run of tokens: the arguments of hsp.delta_rule if beta is given, else those of
    hsp.linear_attention, and a `skip` that is added to what they return."""

    q: Tensor  # [B,T,G,K]
    k: Tensor  # [B,T,G,K]
    v: Tensor  # [B,T,H,V]
    log_decay: Tensor | None = None  # [H], [B,T,H] or [B,T,H,K]
    beta: Tensor | None = None  # [B,T,H]
    bonus: Tensor | None = None  # [H,K]
    skip: Tensor | None = None  # [B,T,H,V]


class RecurrentMixer(nn.Module):
    """x_BTD -> q, k, v, gate, the first three through a short convolution if there is one; the rule turns them into
    the inputs of a recurrence; then

        S_t = exp(log_decay_t) S_(t-1) + k_t^T v_t        y_t = (norm(scale * q_t S_t) * gate(g_t)) W_output

    or with the delta rule S_t = (I - beta_t k_t^T k_t) exp(log_decay_t) S_(t-1) + beta_t k_t^T v_t.
    `rule(x_BTD, q, k, v, positions_T)` returns RecurrenceInputs. One token after another with a cache is this same
    forward, from state to state.
    """

    def __init__(self, shape: MixerShape, context: BlockContext, rule: nn.Module) -> None:
        super().__init__()
        values = shape.heads * shape.value
        self.shape = shape
        self.backend = context.backend_of("delta_rule" if shape.delta else "linear_attention")
        self.project = HeadProjection(context.dim, shape.projected)
        if shape.conv:
            self.conv = ShortConv(channels(shape.qkv), shape.conv, bias=shape.conv_bias)
        self.rule = rule
        self.norm: nn.Module = nn.Identity()
        if shape.norm_heads:
            self.norm = HeadNorm(shape.norm_heads, shape.norm_weights, shape.value, context.norm_eps)
        if shape.gate_rank:
            halves = nn.Linear(context.dim, shape.gate_rank, bias=False), nn.Linear(shape.gate_rank, values, bias=False)
            self.gate = nn.Sequential(*halves)
        self.output = nn.Linear(values, context.dim, bias=False)

    def init_cache(self, batch: int) -> LayerCache:
        """The state before the first token: zero, in the dtype of the model, at least fp32."""
        shape, weight = self.shape, self.output.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        state = torch.zeros(batch, shape.heads, shape.key, shape.value, device=weight.device, dtype=dtype)
        recent = [self.conv.init_state(batch)] if shape.conv else []
        normaliser = [state[..., 0].clone()] if shape.normalize else []
        return LayerCache(position=0, tensors=(*recent, state, *normaliser))

    def cost(self) -> Cost:
        """The cost of the recurrence and of the convolution, with the mixer's parameters."""
        shape = self.shape
        matrix = shape.heads * shape.value * shape.key
        normaliser = shape.heads * shape.key if shape.normalize else 0
        return count_parameters(self) + Cost(
            recurrence_flops=(6 if shape.delta else 4) * matrix + 2 * normaliser,  # S + k^T v, q S, with delta k S; q z
            state=matrix + normaliser,
            summaries=(shape.summary,),
            halos=(self.conv.halo,) if shape.conv else (),
        )

    def forward(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        shape = self.shape
        positions_T = token_positions(x_BTD, shard, cache)
        state = () if cache is None else cache.tensors
        recent, state = (state[0], state[1:]) if state and shape.conv else (None, state)

        projected_BTC, width = self.project.linear(x_BTD), channels(shape.qkv)
        mixed_BTC, gate_BTC = projected_BTC[..., :width], projected_BTC[..., width:]
        if shape.conv:
            mixed_BTC, recent = self.conv(mixed_BTC, shard, recent)
        inputs = self.rule(x_BTD, *cut_heads(mixed_BTC, shape.qkv), positions_T)
        o_BTHV, state = self._recur(inputs, shard, state)
        if cache is not None:
            cache = cache.extended(x_BTD.shape[1], *([] if recent is None else [recent]), *state)

        if shape.gate is None:
            y_BTHV = self.norm(o_BTHV)
        else:
            (gate_BTHV,) = cut_heads(self.gate(x_BTD) if shape.gate_rank else gate_BTC, [(shape.heads, shape.value)])
            gate_BTHV = shape.gate(gate_BTHV)
            y_BTHV = self.norm(o_BTHV * gate_BTHV) if shape.gate_first else self.norm(o_BTHV) * gate_BTHV
        return self.output(rearrange(y_BTHV, "b t h v -> b t (h v)")), cache

    def _recur(
        self, inputs: RecurrenceInputs, shard: Shard | None, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """o_BTHV, and if a state is given the state after these tokens."""
        q, k, v, log_decay, beta, bonus, skip = inputs
        recur: Any
        if beta is not None:
            recur = partial(hsp.delta_rule, beta=beta)
        else:
            recur = partial(hsp.linear_attention, bonus=bonus, normalize=self.shape.normalize)
        recur = partial(recur, q, k, v, log_decay=log_decay, scale=self.shape.scale, backend=self.backend)
        if not state:
            o_BTHV = recur(shard=shard)
        elif self.shape.normalize:
            o_BTHV, state = recur(initial_state=state, return_final_state=True)
        else:
            o_BTHV, final = recur(initial_state=state[0], return_final_state=True)
            state = (final,)
        return o_BTHV if skip is None else o_BTHV + skip, state
