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
from layers.recurrence import MixerShape, RecurrentMixer
from layers.registry import BlockContext, MixerSpec, at_least, register


@register("delta_net")
@dataclass(frozen=True, kw_only=True)
class DeltaNetSpec(MixerSpec):
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv: int = 4  # tokens that the short convolution reads
    output_gate: bool = False
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        at_least(2, "delta_net", conv=self.conv)

    def build(self, context: BlockContext) -> RecurrentMixer:
        shape = MixerShape(
            heads=context.heads,
            key=context.width(self.expand_k, option="expand_k"),
            value=context.width(self.expand_v, option="expand_v"),
            conv=self.conv,
            delta=True,
            gate=F.silu if self.output_gate else None,
        )
        rule = DeltaRule(context.dim, context.heads, steps=None, negative=self.negative_eigenvalues)
        return RecurrentMixer(shape, context, rule)
