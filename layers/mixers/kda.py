"""The Kimi Delta Attention mixer, KDA, of Kimi Linear (arXiv 2510.26692).

    S_t = (I - b_t k_t^T k_t) diag(a_t) S_(t-1) + b_t k_t^T v_t    log a_t = -exp(A_log) softplus(x_t W_1 W_2 + dt_bias)
    y_t = (RMSNorm(q_t S_t / sqrt(K)) * sigmoid(x_t W_3 W_4)) W_o    b_t = sigmoid(x_t W_b)

a_t has one number per channel of a key and value head, A_log one per head. The ranks of W_1 W_2 and W_3 W_4 are the
width of a value. Later models differ, and so do these options:

    gate_lower_bound    log a_t = gate_lower_bound * sigmoid(exp(A_log) (x_t W_1 W_2 + dt_bias)), if it is below 0
    full_rank           one matrix instead of W_3 W_4 (output), or of W_1 W_2 as well (both)
    key_heads           values have more heads than queries and keys, as in gated_delta_net

Kimi K3 and Ling 3 bound the gate by -5. No channel then forgets more than a share of 1 - exp(-5) at one token.
With negative_eigenvalues b_t is twice as large (arXiv 2411.12537). q, k and v pass through a short convolution with
SiLU. Then q and k are divided by their length. The norm is per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from layers.delta import DeltaRule
from layers.recurrence import MixerShape, RecurrentSpec, Rule
from layers.registry import BlockContext, register, unknown
from layers.timestep import TimeStep

FULL_RANK = ("none", "output", "both")


@register("kda")
@dataclass(frozen=True, kw_only=True)
class KDASpec(RecurrentSpec):
    conv: int = 4
    expand_k: float = 1.0  # of one key head for each value head
    expand_v: float = 1.0
    key_heads: int = 0  # value head h reads key head h // (heads // key_heads); 0: as many as heads
    gate_rank: int = 0  # rank of the products of two matrices; 0: the width of a value
    full_rank: str = "none"  # gates of one matrix: none, output, or both
    gate_lower_bound: float = 0.0  # of log a_t, -5 in Kimi K3; 0: no bound
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        if self.full_rank not in FULL_RANK:
            raise unknown("full_rank", self.full_rank, FULL_RANK, " of mixer 'kda'")
        if self.gate_lower_bound > 0:
            raise ValueError(
                f"gate_lower_bound of kda is {self.gate_lower_bound}; it must be below 0, such as -5, or 0 for no bound"
            )

    def shape(self, context: BlockContext) -> MixerShape:
        value = context.width(self.expand_v, option="expand_v")
        return MixerShape(
            heads=context.heads,
            key=context.width(self.expand_k, option="expand_k"),
            value=value,
            groups=context.groups(self.key_heads, option="key_heads"),
            decay="vector",
            delta=True,
            gate=torch.sigmoid,
            gate_rank=0 if self.full_rank != "none" else self.gate_rank or value,
        )

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        keys, rank = shape.heads * shape.key, self.gate_rank or shape.value
        project: nn.Module = nn.Linear(context.dim, keys, bias=False)
        if self.full_rank != "both":
            project = nn.Sequential(nn.Linear(context.dim, rank, bias=False), nn.Linear(rank, keys, bias=False))
        steps = TimeStep(project, shape.heads, shape.key, lower_bound=self.gate_lower_bound)
        return DeltaRule(context.dim, shape.heads, steps, negative=self.negative_eigenvalues)
