"""The HGRN2 mixer: a gated linear RNN whose forget gate is also the key (arXiv 2404.07904).

    f_t = b + (1 - b) sigmoid(x_t W_f)        S_t = diag(f_t) S_(t-1) + (1 - f_t)^T v_t
    y_t = RMSNorm(silu(x_t W_q) S_t / sqrt(K)) W_o

The key is the share 1 - f_t of the state that a token forgets. The norm is over all heads together. The lower bound b
grows with the depth, so that deeper blocks remember longer. In the paper the bounds of all blocks are partial sums of
one softmax over the depth, which start at l / depth in block l, from 0. Here mixers share no weights. b starts at the
same l / depth for every channel of keys, and `lower_bound` is one of:

    learned     b = sigmoid(a weight), which training may move between 0 and 1; in block 0 it stays 0
    fixed       b stays l / depth
    none        b = 0 in every block
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.precision import keep_wide
from layers.recurrence import MixerShape, RecurrenceInputs, RecurrentSpec, Rule
from layers.registry import BlockContext, register, unknown

LOWER_BOUNDS = ("learned", "fixed", "none")


@register("hgrn2")
@dataclass(frozen=True, kw_only=True)
class HGRN2Spec(RecurrentSpec):
    lower_bound: str = "learned"

    def __post_init__(self) -> None:
        if self.lower_bound not in LOWER_BOUNDS:
            raise unknown("lower bound", self.lower_bound, LOWER_BOUNDS)

    def shape(self, context: BlockContext) -> MixerShape:
        width = context.width()
        return MixerShape(heads=context.heads, key=width, value=width, decay="vector", norm="all")

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        return HGRN2Rule(self, context)


class HGRN2Rule(nn.Module):
    _apply = keep_wide("bound")

    def __init__(self, spec: HGRN2Spec, context: BlockContext) -> None:
        super().__init__()
        self.start = 0.0 if spec.lower_bound == "none" else context.layer / context.depth
        self.bound = None
        if spec.lower_bound == "learned" and self.start > 0:
            self.bound = nn.Parameter(torch.empty(context.heads * context.width()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set b to l / depth."""
        if self.bound is not None:
            self.bound.fill_(logit(self.start))

    def forward(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, positions_T: Tensor
    ) -> RecurrenceInputs:
        z = k_BTHK.to(torch.promote_types(k_BTHK.dtype, torch.float32))
        log_f, write = F.logsigmoid(z), torch.sigmoid(-z)
        if self.start > 0:
            if self.bound is None:
                bound = z.new_full((), logit(self.start))
            else:
                bound = self.bound.to(z.dtype).view(z.shape[2:])
            log_b = F.logsigmoid(bound)
            # f = sigmoid(z) / sigmoid(z - log b). The second form is equal, and exact for large negative z.
            log_f = torch.where(
                z >= 0, log_f - F.logsigmoid(z - log_b), log_b + F.logsigmoid(-z) - F.logsigmoid(log_b - z)
            )
            write = write * torch.sigmoid(-bound)
        return RecurrenceInputs(F.silu(q_BTHK), write.to(q_BTHK.dtype), v_BTHV, log_f)


def logit(p: float) -> float:
    """Invert the sigmoid."""
    return math.log(p / (1 - p))
