"""The Gated DeltaProduct mixer (arXiv 2502.10297): Gated DeltaNet with n writes per token, each under a key of its own.

    S_t,0 = a_t S_(t-1),n        S_t,j = (I - b_t,j k_t,j^T k_t,j) S_t,(j-1) + b_t,j k_t,j^T v_t,j       j = 1 ... n
    y_t = (RMSNorm(q_t S_t,n / sqrt(K)) * silu(g_t)) W_o     log a_t = -exp(A_log) softplus(x_t W_a + dt_bias) per head

n is `steps`. The state thus passes through a product of n generalised Householder matrices per token: two reflections,
with b = 2 of negative_eigenvalues, swap three rows in a circle, which one cannot. b_t,j = sigmoid(x_t W_b,j), twice as
large with negative_eigenvalues. q, k and v pass through a short convolution with SiLU. Then q and k are divided by
their length. The norm is per head. The operator is the delta rule over n tokens in the place of each: the first decays,
the last is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from layers.delta import DeltaRule
from layers.recurrence import MixerShape, RecurrenceInputs, RecurrentSpec, Rule
from layers.registry import BlockContext, at_least, register
from layers.timestep import TimeStep


@register("gated_delta_product")
@dataclass(frozen=True, kw_only=True)
class GatedDeltaProductSpec(RecurrentSpec):
    conv: int = 4
    steps: int = 2  # writes per token
    expand_k: float = 0.75  # of one key head for each value head, and of one step
    expand_v: float = 1.5  # of one step
    key_heads: int = 0  # value head h reads key head h // (heads // key_heads); 0: as many as heads
    negative_eigenvalues: bool = True

    def __post_init__(self) -> None:
        at_least(1, "gated_delta_product", steps=self.steps)

    def shape(self, context: BlockContext) -> MixerShape:
        return MixerShape(
            heads=context.heads,
            key=context.width(self.expand_k, option="expand_k"),
            value=context.width(self.expand_v, option="expand_v"),
            groups=context.groups(self.key_heads, option="key_heads"),
            steps=self.steps,
            decay="scalar",
            delta=True,
            gate=F.silu,
        )

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        return DeltaProductRule(context.dim, shape, negative=self.negative_eigenvalues)


class DeltaProductRule(nn.Module):
    """Prepare the writes as for a delta rule, and lay those of a token one after the other: n T tokens of one write."""

    def __init__(self, dim: int, shape: MixerShape, *, negative: bool) -> None:
        super().__init__()
        self.writes = shape.steps
        steps = TimeStep(nn.Linear(dim, shape.heads, bias=False), shape.heads)
        self.write = DeltaRule(dim, shape.steps * shape.heads, steps, negative=negative)

    def forward(
        self, x_BTD: Tensor, q_BTGK: Tensor, k_BTJK: Tensor, v_BTJV: Tensor, positions_T: Tensor
    ) -> RecurrenceInputs:
        return self.interleaved(self.write(x_BTD, q_BTGK, k_BTJK, v_BTJV, positions_T))

    def interleaved(self, inputs: RecurrenceInputs) -> RecurrenceInputs:
        """Make n T tokens of inputs whose k, v and beta have n times the heads, those of the first write first."""
        q, k, v, log_decay, beta, *_ = inputs
        assert log_decay is not None and beta is not None
        k, v, beta = (x.unflatten(2, (self.writes, -1)).flatten(1, 2) for x in (k, v, beta))
        q = F.pad(q[:, :, None], (0, 0, 0, 0, self.writes - 1, 0)).flatten(1, 2)
        log_decay = F.pad(log_decay[:, :, None], (0, 0, 0, self.writes - 1)).flatten(1, 2)
        return RecurrenceInputs(q, k, v, log_decay, beta)
