"""The lightning attention mixer: decays of TransNormerLLM (arXiv 2307.14995), gate and norm of MiniMax-01 (2501.08313).

    S_t = a S_(t-1) + silu(k_t)^T v_t        log a = -(8 h / H) (1 - l / depth) in head h of H in block l, both from 0
    y_t = (RMSNorm(silu(q_t) S_t / sqrt(K)) * sigmoid(g_t)) W_o

The norm is over all heads together. Head 0 never forgets, and deeper blocks forget more slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.recurrence import MixerShape, RecurrenceInputs, RecurrentSpec, Rule
from layers.registry import BlockContext, register


@register("lightning")
@dataclass(frozen=True, kw_only=True)
class LightningSpec(RecurrentSpec):
    def shape(self, context: BlockContext) -> MixerShape:
        width = context.width()
        return MixerShape(heads=context.heads, key=width, value=width, decay="fixed", gate=torch.sigmoid, norm="all")

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        slope = 8 / shape.heads * (1 - context.layer / context.depth)
        return partial(lightning_rule, slope)


def lightning_rule(
    slope: float, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, positions_T: Tensor
) -> RecurrenceInputs:
    head_H = torch.arange(q_BTHK.shape[2], device=x_BTD.device, dtype=torch.float64)
    return RecurrenceInputs(F.silu(q_BTHK), F.silu(k_BTHK), v_BTHV, -slope * head_H)
