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
from layers.recurrence import MixerShape, RecurrentMixer
from layers.registry import BlockContext, MixerSpec, at_least, register
from layers.timestep import TimeStep


@register("gated_delta_net")
@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetSpec(MixerSpec):
    expand_k: float = 0.75  # of one key head for each value head
    expand_v: float = 1.5
    key_heads: int = 0  # value head h reads key head h // (heads // key_heads); 0: as many as heads
    conv: int = 4  # tokens that the short convolution reads
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        at_least(0, "gated_delta_net", key_heads=self.key_heads)
        at_least(2, "gated_delta_net", conv=self.conv)

    def build(self, context: BlockContext) -> RecurrentMixer:
        shape = MixerShape(
            heads=context.heads,
            key=context.width(self.expand_k, option="expand_k"),
            value=context.width(self.expand_v, option="expand_v"),
            groups=context.groups(self.key_heads, option="key_heads"),
            conv=self.conv,
            decay="scalar",
            delta=True,
            gate=F.silu,
        )
        steps = TimeStep(nn.Linear(context.dim, context.heads, bias=False), context.heads)
        rule = DeltaRule(context.dim, context.heads, steps, negative=self.negative_eigenvalues)
        return RecurrentMixer(shape, context, rule)
