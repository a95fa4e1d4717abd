"""The Gated DeltaNet mixer (arXiv 2412.06464). As in Qwen3-Next, values may have more heads than keys.

    S_t = a_t (I - b_t k_t^T k_t) S_(t-1) + b_t k_t^T v_t    log a_t = -exp(A_log) softplus(x_t W_a + dt_bias) per head
    y_t = (RMSNorm(q_t S_t / sqrt(K)) * silu(g_t)) W_o       b_t = sigmoid(x_t W_b)

With negative_eigenvalues b_t is twice as large (arXiv 2411.12537). q, k and v pass through a short convolution with
SiLU. Then q and k are divided by their length. The norm is per head. Values have twice the width of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from layers.delta import DeltaRule
from layers.recurrence import MixerShape, RecurrentSpec, Rule
from layers.registry import BlockContext, register
from layers.timestep import TimeStep


@register("gated_delta_net")
@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetSpec(RecurrentSpec):
    conv: int = 4
    expand_k: float = 0.75  # of one key head for each value head
    expand_v: float = 1.5
    key_heads: int = 0  # value head h reads key head h // (heads // key_heads); 0: as many as heads
    negative_eigenvalues: bool = False

    def shape(self, context: BlockContext) -> MixerShape:
        return MixerShape(
            heads=context.heads,
            key=context.width(self.expand_k, option="expand_k"),
            value=context.width(self.expand_v, option="expand_v"),
            groups=context.groups(self.key_heads, option="key_heads"),
            decay="scalar",
            delta=True,
            gate=F.silu,
        )

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        steps = TimeStep(nn.Linear(context.dim, shape.heads, bias=False), shape.heads)
        return DeltaRule(context.dim, shape.heads, steps, negative=self.negative_eigenvalues)
