"""The DeltaNet mixer (arXiv 2102.11174), with the short convolutions and normalised keys of arXiv 2406.06484.

    S_t = (I - b_t k_t^T k_t) S_(t-1) + b_t k_t^T v_t        b_t = sigmoid(x_t W_b)
    y_t = (RMSNorm(q_t S_t / sqrt(K)) [* silu(g_t)]) W_o     the gate only with output_gate

With negative_eigenvalues b_t is twice as large (arXiv 2411.12537). q, k and v pass through a short convolution with
SiLU. Then q and k are divided by their length. The norm is per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from layers.delta import DeltaRule
from layers.recurrence import MixerShape, RecurrentSpec, Rule
from layers.registry import BlockContext, register


@register("delta_net")
@dataclass(frozen=True, kw_only=True)
class DeltaNetSpec(RecurrentSpec):
    conv: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    output_gate: bool = False
    negative_eigenvalues: bool = False

    def shape(self, context: BlockContext) -> MixerShape:
        return MixerShape(
            heads=context.heads,
            key=context.width(self.expand_k, option="expand_k"),
            value=context.width(self.expand_v, option="expand_v"),
            delta=True,
            gate=F.silu if self.output_gate else None,
        )

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        return DeltaRule(context.dim, shape.heads, steps=None, negative=self.negative_eigenvalues)
