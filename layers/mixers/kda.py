"""The Kimi Delta Attention mixer, KDA, of Kimi Linear (arXiv 2510.26692).

    S_t = (I - b_t k_t^T k_t) diag(a_t) S_(t-1) + b_t k_t^T v_t    log a_t = -exp(A_log) softplus(x_t W_1 W_2 + dt_bias)
    y_t = (RMSNorm(q_t S_t / sqrt(K)) * sigmoid(x_t W_3 W_4)) W_o    b_t = sigmoid(x_t W_b)

a_t has one number per channel of a key, A_log one per head. The ranks of W_1 W_2 and W_3 W_4 are the width of a value.
With negative_eigenvalues b_t is twice as large (arXiv 2411.12537). q, k and v pass through a short convolution with
SiLU. Then q and k are divided by their length. The norm is per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from layers.delta import DeltaRule
from layers.recurrence import MixerShape, RecurrentMixer
from layers.registry import BlockContext, MixerSpec, at_least, register
from layers.timestep import TimeStep


@register("kda")
@dataclass(frozen=True, kw_only=True)
class KDASpec(MixerSpec):
    expand_k: float = 1.0
    expand_v: float = 1.0
    gate_rank: int = 0  # rank of the products of two matrices; 0: the width of a value
    conv: int = 4  # tokens that the short convolution reads
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        at_least(0, "kda", gate_rank=self.gate_rank)
        at_least(2, "kda", conv=self.conv)

    def build(self, context: BlockContext) -> RecurrentMixer:
        value = context.width(self.expand_v, option="expand_v")
        shape = MixerShape(
            heads=context.heads,
            key=context.width(self.expand_k, option="expand_k"),
            value=value,
            conv=self.conv,
            decay="vector",
            delta=True,
            gate=torch.sigmoid,
            gate_rank=self.gate_rank or value,
        )
        project = nn.Sequential(
            nn.Linear(context.dim, shape.gate_rank, bias=False),
            nn.Linear(shape.gate_rank, shape.heads * shape.key, bias=False),
        )
        steps = TimeStep(project, shape.heads, shape.key)
        rule = DeltaRule(context.dim, shape.heads, steps, negative=self.negative_eigenvalues)
        return RecurrentMixer(shape, context, rule)
