"""The ReBased linear attention mixer (arXiv 2402.10644): Based with a learned parabola.

    y_t = (sum over s <= t of w_ts v_s / sum over s <= t of w_ts) W_o        w_ts = (q'_t . k'_s)^2 / d
    q' = gamma_q * norm(q) + beta_q        k' = gamma_k * norm(k) + beta_k

Queries and keys have d = `feature_dim` channels. w is a product of d (d + 1) / 2 features. Unlike Based's it can be 0,
which ignores a token. The norm is a LayerNorm per head without weights. gamma and beta have one number per head and
channel, and start at 1 and 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.mixers.based import pairs, squares
from layers.recurrence import MixerShape, RecurrenceInputs, RecurrentSpec, Rule
from layers.registry import BlockContext, at_least, register


@register("rebased")
@dataclass(frozen=True, kw_only=True)
class ReBasedSpec(RecurrentSpec):
    feature_dim: int = 16

    def __post_init__(self) -> None:
        at_least(2, "rebased", feature_dim=self.feature_dim)  # the norm of one channel is 0

    def shape(self, context: BlockContext) -> MixerShape:
        return MixerShape(
            heads=context.heads,
            key=pairs(self.feature_dim),
            value=context.width(),
            features=self.feature_dim,
            normalize=True,
            scale=1 / self.feature_dim,
        )

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        return ReBasedRule(context, self.feature_dim)


class ReBasedRule(nn.Module):
    def __init__(self, context: BlockContext, dim: int) -> None:
        super().__init__()
        self.norm_eps = context.norm_eps
        self.shape = (2, context.heads, dim)  # of gamma and beta: of queries and of keys
        self.gamma = nn.Parameter(torch.empty(math.prod(self.shape)))
        self.beta = nn.Parameter(torch.empty(math.prod(self.shape)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set gamma to ones and beta to zeros."""
        self.gamma.fill_(1.0)
        self.beta.zero_()

    def forward(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, positions_T: Tensor
    ) -> RecurrenceInputs:
        gammas, betas = self.gamma.view(self.shape), self.beta.view(self.shape)
        q_BTHK, k_BTHK = (
            squares(F.layer_norm(x, x.shape[-1:], eps=self.norm_eps) * gamma_HK + beta_HK)
            for x, gamma_HK, beta_HK in zip((q_BTHK, k_BTHK), gammas, betas, strict=True)
        )
        return RecurrenceInputs(q_BTHK, k_BTHK, v_BTHV)
