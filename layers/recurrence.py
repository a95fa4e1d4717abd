"""RecurrentMixer: what every linear mixer is made of, around the rule that makes it the one it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

import hybrid_sp as hsp
from hybrid_sp.layout import Shard
from layers.cache import LayerCache
from layers.cost import Cost
from layers.heads import HeadProjection
from layers.registry import Place
from layers.rotary import token_positions


@dataclass(frozen=True, kw_only=True)
class Form:
    """The sizes of a linear mixer, and how its output leaves the heads.

    The state is S_BHKV, and z_BHK beside it with `normalize`. Unnormalised outputs grow with the tokens read, so these
    pass through an RMSNorm: per head with one weight [V], or with `joint_norm` over all heads with a weight [H*V].
    """

    heads: int
    key: int
    value: int
    decay: str = "none"  # of the state: none, fixed (per head), scalar (per head and token) or vector (over K as well)
    gate: Callable[[Tensor], Tensor] | None = None  # the activation of the output gate
    normalize: bool = False
    joint_norm: bool = False

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(heads, width) of the query, the key, the value and, if there is one, the output gate."""
        widths = [self.key, self.key, self.value] + ([self.value] if self.gate else [])
        return [(self.heads, width) for width in widths]

    @property
    def norm_heads(self) -> int:
        """Heads that one output norm is taken over; 0 if the normaliser takes its place."""
        if self.normalize:
            return 0
        return self.heads if self.joint_norm else 1

    def cost(self, dim: int) -> Cost:
        """The cost of a mixer of this form, without what its rule adds."""
        matrix = self.heads * self.key * self.value
        normaliser = self.heads * self.key if self.normalize else 0
        return Cost(
            matrices=dim * sum(heads * width for heads, width in [*self.sizes, (self.heads, self.value)]),
            vectors=self.norm_heads * self.value,
            mixing=4 * matrix + 2 * normaliser,  # S + k^T v and q S; q z
            state=matrix + normaliser,
        )


class RecurrentMixer(nn.Module):
    """x_BTD -> q, k, v, gate; the rule turns q, k into queries, keys and a log decay; then

        S_t = exp(log_decay_t) S_(t-1) + k_t^T v_t        y_t = (norm(q_t S_t / sqrt(K)) * gate(g_t)) W_output

    `rule(x_BTD, q_BTHK, k_BTHK, positions_T)` returns (q_BTHK, k_BTHK, log_decay), log_decay as hsp.linear_attention
    takes it. One token after another with a cache is this same forward, from state to state.
    """

    def __init__(self, form: Form, place: Place, rule: nn.Module) -> None:
        super().__init__()
        self.form = form
        self.project = HeadProjection(place.dim, form.sizes)
        self.rule = rule
        if form.norm_heads:
            self.norm = nn.RMSNorm(form.norm_heads * form.value, eps=place.norm_eps)
        self.output = nn.Linear(form.heads * form.value, place.dim, bias=False)

    def init_cache(self, batch: int) -> LayerCache:
        """The state before the first token: zero, in the dtype of the model, at least fp32."""
        form, weight = self.form, self.output.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        state = torch.zeros(batch, form.heads, form.key, form.value, device=weight.device, dtype=dtype)
        return LayerCache(position=0, tensors=(state, state[..., 0].clone()) if form.normalize else (state,))

    def forward(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        positions_T = token_positions(x_BTD, shard, cache)
        q_BTHK, k_BTHK, v_BTHV, *gate_BTHV = self.project(x_BTD)
        q_BTHK, k_BTHK, log_decay = self.rule(x_BTD, q_BTHK, k_BTHK, positions_T)
        normalize, norm_heads = self.form.normalize, self.form.norm_heads
        recur: Callable[..., Any] = partial(
            hsp.linear_attention, q_BTHK, k_BTHK, v_BTHV, log_decay=log_decay, normalize=normalize
        )
        if cache is None:
            o_BTHV = recur(shard=shard)
        else:
            initial = cache.tensors if normalize else cache.tensors[0]
            o_BTHV, final = recur(initial_state=initial, return_final_state=True)
            cache = cache.extended(x_BTD.shape[1], *(final if normalize else [final]))
        if norm_heads:
            groups = self.norm(rearrange(o_BTHV, "b t (g n) v -> b t g (n v)", n=norm_heads))
            o_BTHV = rearrange(groups, "b t g (n v) -> b t (g n) v", n=norm_heads)
        if self.form.gate:
            o_BTHV = o_BTHV * self.form.gate(*gate_BTHV)
        return self.output(rearrange(o_BTHV, "b t h v -> b t (h v)")), cache
