"""The parts that linear mixers share: projections, short convolution, recurrence, norm and gate.

A mixer supplies its shape, and a rule that turns queries, keys and values into the inputs of the recurrence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from layers.registry import BlockContext, MixerSpec
from layers.rotary import token_positions


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """Describe a linear mixer: its sizes, its recurrence, and the norm and gate of its output.

    The state is S_BHKV, with z_BHK if `normalize` divides the output by a sum of features. Other outputs grow with the
    number of tokens and therefore pass through an RMSNorm. `norm` names the heads that it takes together: head (one
    weight [V] for all heads), group (the heads that share a key) or all. The last two have a weight [H*V].
    """

    heads: int  # of values, decays and states
    key: int  # width of queries and keys in the recurrence
    value: int
    groups: int | None = None  # heads of queries and keys; value head h reads h // (heads // groups). None: heads
    features: int | None = None  # width of queries and keys before a feature map; None: key
    conv: int = 0  # tokens that the short convolution of queries, keys and values reads; 0: none
    conv_bias: bool = False
    decay: str = "none"  # none, fixed (per head), scalar (per head and token) or vector (over K as well)
    steps: int = 1  # updates of the state per token, each with a key and a value; the last one reads
    delta: bool = False  # whether a write replaces the value under its key, by the delta rule, or adds to it
    scale: float | None = None  # of queries; None: K**-0.5
    gate: Callable[[Tensor], Tensor] | None = None  # the activation of the output gate
    gate_rank: int = 0  # inner channels of a gate of two matrices; 0: one matrix
    gate_first: bool = False  # norm(o * gate) instead of norm(o) * gate
    normalize: bool = False
    norm: str = "head"  # head, group, all or none

    @property
    def key_heads(self) -> int:
        """The number of heads of queries and keys."""
        return self.heads if self.groups is None else self.groups

    @property
    def qkv(self) -> Sizes:
        """The (heads, width) of the projected query, key and value."""
        width = self.key if self.features is None else self.features
        return [(self.key_heads, width), (self.steps * self.key_heads, width), (self.steps * self.heads, self.value)]

    @property
    def norm_heads(self) -> int:
        """The number of heads in one output norm; 0 without one, as with a normaliser, which replaces it."""
        if self.normalize:
            return 0
        return {"head": 1, "group": self.heads // self.key_heads, "all": self.heads, "none": 0}[self.norm]


class RecurrenceInputs(NamedTuple):
    """Hold the output of a rule: the arguments of hsp.delta_rule if beta is given, else of hsp.linear_attention.

    A shape with `steps` has so many tokens here for each of the input's, one after the other. `skip` is added to the
    output.
    """

    q: Tensor  # [B,T,G,K]
    k: Tensor  # [B,T,G,K]
    v: Tensor  # [B,T,H,V]
    log_decay: Tensor | None = None  # [H], [B,T,H] or [B,T,H,K]
    beta: Tensor | None = None  # [B,T,H]
    bonus: Tensor | None = None  # [H,K]
    skip: Tensor | None = None  # [B,T,H,V], of the input's tokens


Rule = Callable[..., RecurrenceInputs]  # of x_BTD, q, k, v and positions_T


@dataclass(frozen=True, kw_only=True)
class RecurrentSpec(MixerSpec):
    """Hold the options of every mixer that is a recurrence. A mixer's own spec adds its shape and its rule."""

    heads: int = 0  # of values, decays and states; 0: the model's
    head_dim: int = 0  # width of a head, before it is expanded; 0: dim / heads
    conv: int = 0  # tokens that the short convolution of queries, keys and values reads; 0: none, and no SiLU

    def shape(self, context: BlockContext) -> MixerShape:
        """Return the sizes of the mixer. The option `conv` is added to them."""
        raise NotImplementedError

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        """Return what makes the inputs of the recurrence."""
        raise NotImplementedError

    def build(self, context: BlockContext) -> RecurrentMixer:
        context = context.resized(self.heads, self.head_dim)
        shape = replace(self.shape(context), conv=self.conv)
        return RecurrentMixer(shape, context, self.rule(context, shape))


class RecurrentMixer(nn.Module):
    """Project x_BTD to q, k, v and a gate, convolve q, k and v if the shape asks, apply the rule, and recur:

        S_t = exp(log_decay_t) S_(t-1) + k_t^T v_t        y_t = (norm(scale * q_t S_t) * gate(g_t)) W_output

    The delta rule is S_t = (I - beta_t k_t^T k_t) exp(log_decay_t) S_(t-1) + beta_t k_t^T v_t.
    `rule(x_BTD, q, k, v, positions_T)` returns RecurrenceInputs. Decoding with a cache is the same forward, which then
    starts from a state and returns the next one.
    """

    def __init__(self, shape: MixerShape, context: BlockContext, rule: Rule) -> None:
        super().__init__()
        values = shape.heads * shape.value
        self.shape = shape
        self.backend = context.backend_of("delta_rule" if shape.delta else "linear_attention")
        gates = [(shape.heads, shape.value)] if shape.gate and not shape.gate_rank else []
        self.project = HeadProjection(context.dim, [*shape.qkv, *gates])
        if shape.conv:
            self.conv = ShortConv(channels(shape.qkv), shape.conv, bias=shape.conv_bias)
        self.rule = rule
        self.norm: nn.Module = nn.Identity()
        if shape.norm_heads:
            weights = 1 if shape.norm == "head" else shape.heads
            self.norm = HeadNorm(shape.norm_heads, weights, shape.value, context.norm_eps)
        if shape.gate_rank:
            self.gate = nn.Sequential(
                nn.Linear(context.dim, shape.gate_rank, bias=False), nn.Linear(shape.gate_rank, values, bias=False)
            )
        self.output = nn.Linear(values, context.dim, bias=False)

    def init_cache(self, batch: int) -> LayerCache:
        """Make the cache before the first token: a state of zeros in the dtype of the model, at least fp32."""
        shape, weight = self.shape, self.output.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        state = torch.zeros(batch, shape.heads, shape.key, shape.value, device=weight.device, dtype=dtype)
        recent = [self.conv.init_state(batch)] if shape.conv else []
        normaliser = [state[..., 0].clone()] if shape.normalize else []
        return LayerCache(position=0, tensors=(*recent, state, *normaliser))

    def cost(self) -> Cost:
        """Add the cost of the recurrence and the convolution to the mixer's parameters."""
        shape = self.shape
        matrix = shape.heads * shape.value * shape.key
        normaliser = shape.heads * shape.key if shape.normalize else 0
        summary = Summary(
            heads=shape.heads,
            key=shape.key,
            value=shape.value,
            transition="matrix" if shape.delta else shape.decay,
            normalize=shape.normalize,
            groups=shape.groups,
            steps=shape.steps,
            gates=shape.delta + {"scalar": 1, "vector": shape.key}.get(shape.decay, 0),
        )
        return count_parameters(self) + Cost(
            # S + k^T v, q S, with delta k S; q z. Every step reads, though the output is that of the last alone.
            recurrence_flops=shape.steps * ((6 if shape.delta else 4) * matrix + 2 * normaliser),
            state=matrix + normaliser,
            summaries=(summary,),
            halos=(self.conv.halo,) if shape.conv else (),
        )

    def forward(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        positions_T = token_positions(x_BTD, shard, cache)
        state = () if cache is None else cache.tensors
        recent, state = (state[0], state[1:]) if state and self.shape.conv else (None, state)
        inputs, gate_BTC, recent = self._inputs(x_BTD, positions_T, shard, recent)
        recur: Any = partial(self._operator(inputs), *inputs[:3], **self._options(inputs))
        if not state:
            o_BTHV = recur(shard=shard)
        elif self.shape.normalize:
            o_BTHV, state = recur(initial_state=state, return_final_state=True)
        else:
            o_BTHV, final = recur(initial_state=state[0], return_final_state=True)
            state = (final,)
        if cache is not None:
            cache = cache.extended(x_BTD.shape[1], *([] if recent is None else [recent]), *state)
        return self._output(x_BTD, inputs, o_BTHV, gate_BTC), cache

    def start(self, x_BTD: Tensor, shard: Shard | None) -> Callable[[], Tensor]:
        """Compute and send what other ranks need, and return a function that computes the output."""
        inputs, gate_BTC, _ = self._inputs(x_BTD, token_positions(x_BTD, shard, None), shard, None)
        started = self._operator(inputs).start(*inputs[:3], **self._options(inputs), shard=shard)
        return lambda: self._output(x_BTD, inputs, started.finish(), gate_BTC)

    def _inputs(
        self, x_BTD: Tensor, positions_T: Tensor, shard: Shard | None, recent: Tensor | None
    ) -> tuple[RecurrenceInputs, Tensor, Tensor | None]:
        """Return the inputs of the recurrence, the gate, and the last inputs of the convolution."""
        shape = self.shape
        # 1. Project, and convolve the channels of q, k and v.
        projected_BTC, width = self.project.linear(x_BTD), channels(shape.qkv)
        mixed_BTC, gate_BTC = projected_BTC[..., :width], projected_BTC[..., width:]
        if shape.conv:
            mixed_BTC, recent = self.conv(mixed_BTC, shard, recent)
        # 2. Let the rule make the inputs of the recurrence over the sequence, or from the cached state.
        return self.rule(x_BTD, *cut_heads(mixed_BTC, shape.qkv), positions_T), gate_BTC, recent

    def _operator(self, inputs: RecurrenceInputs) -> Any:
        return hsp.linear_attention if inputs.beta is None else hsp.delta_rule

    def _options(self, inputs: RecurrenceInputs) -> dict[str, Any]:
        """Return the keywords of the operator, but for those of a sequence or a state."""
        options: dict[str, Any] = {"log_decay": inputs.log_decay, "scale": self.shape.scale, "backend": self.backend}
        if inputs.beta is None:
            return options | {"bonus": inputs.bonus, "normalize": self.shape.normalize}
        return options | {"beta": inputs.beta, "steps": self.shape.steps}

    def _output(self, x_BTD: Tensor, inputs: RecurrenceInputs, o_BTHV: Tensor, gate_BTC: Tensor) -> Tensor:
        """Apply norm and gate to what the operator returns, and write to the residual stream."""
        shape = self.shape
        if shape.steps > 1:
            o_BTHV = o_BTHV[:, shape.steps - 1 :: shape.steps]  # the last step of each token reads
        if inputs.skip is not None:
            o_BTHV = o_BTHV + inputs.skip
        o_BTHV = o_BTHV.to(x_BTD.dtype)  # of a rule that widens its inputs
        if shape.gate is None:
            y_BTHV = self.norm(o_BTHV)
        else:
            (gate_BTHV,) = cut_heads(self.gate(x_BTD) if shape.gate_rank else gate_BTC, [(shape.heads, shape.value)])
            gate_BTHV = shape.gate(gate_BTHV)
            y_BTHV = self.norm(o_BTHV * gate_BTHV) if shape.gate_first else self.norm(o_BTHV) * gate_BTHV
        return self.output(rearrange(y_BTHV, "b t h v -> b t (h v)"))
