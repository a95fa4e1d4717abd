"""The Comba mixer (arXiv 2506.02475): a delta rule with feedback weaker than its writes, and a corrected output.

    S_t = (a_t - c b_t k_t^T k_t) S_(t-1) + b_t k_t^T v_t        log a_t = -exp(A_log) softplus(x_t W_a + dt_bias)
    y_t = (RMSNorm((q_t - d k_t) S_t / sqrt(K)) * sigmoid(g_t)) W_o        b_t = sigmoid(x_t W_b)        c = sigmoid(w)

All of a, b, c and d are per head. c is the strength of the feedback, at first 0.73, and d the correction of the output,
at first 0.02, as the authors advise for small models. q, k and v pass through a short convolution with SiLU. Then q and
k are divided by their length. The norm is per head.

What a write replaces is read before the state decays, unlike in Gated DeltaNet. With b' = c b / a and v' = a v / c it
is that rule nevertheless, (I - b' k^T k) a S + b' k^T v', and so the operator is the delta rule. a is at least exp(-60)
here: a state that has decayed by as much is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.delta import DeltaRule
from layers.recurrence import MixerShape, RecurrenceInputs, RecurrentSpec, Rule
from layers.registry import BlockContext, register
from layers.timestep import TimeStep

FEEDBACK, CORRECTION = 1.0, 0.02  # w and d at the start
FLOOR = -60.0  # of log a: its exponential and the inverse of that are numbers of fp32


@register("comba")
@dataclass(frozen=True, kw_only=True)
class CombaSpec(RecurrentSpec):
    conv: int = 4
    expand_k: float = 0.75
    expand_v: float = 1.5

    def shape(self, context: BlockContext) -> MixerShape:
        return MixerShape(
            heads=context.heads,
            key=context.width(self.expand_k, option="expand_k"),
            value=context.width(self.expand_v, option="expand_v"),
            decay="scalar",
            delta=True,
            gate=torch.sigmoid,
        )

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        return CombaRule(context.dim, shape.heads)


class CombaRule(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.delta = DeltaRule(dim, heads, TimeStep(nn.Linear(dim, heads, bias=False), heads))
        self.feedback = nn.Parameter(torch.empty(heads))
        self.correction = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the strengths of the feedback and of the correction to where they start."""
        self.feedback.fill_(FEEDBACK)
        self.correction.fill_(CORRECTION)

    def forward(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, positions_T: Tensor
    ) -> RecurrenceInputs:
        inputs = self.delta(x_BTD, q_BTHK, k_BTHK, v_BTHV, positions_T)
        corrected = inputs.q - self.correction[:, None].to(inputs.q.dtype) * inputs.k
        return with_feedback(inputs._replace(q=corrected), torch.sigmoid(self.feedback))


def with_feedback(inputs: RecurrenceInputs, feedback_H: Tensor) -> RecurrenceInputs:
    """Make the inputs of a delta rule that replaces the share c b of what the state holds before it decays."""
    q, k, v, log_decay, beta, *_ = inputs
    assert log_decay is not None and beta is not None
    if v.dtype == torch.float16:  # whose range v' and its gradient would leave
        q, k, v = q.float(), k.float(), v.float()
    log_decay = log_decay.clamp(min=FLOOR)
    share = feedback_H.to(log_decay.dtype) * torch.exp(-log_decay)  # c / a
    return RecurrenceInputs(q, k, (v / share[..., None]).to(v.dtype), log_decay, share * beta)
