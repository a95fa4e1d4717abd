"""The multi-scale retention mixer of RetNet (arXiv 2307.08621).

    S_t = a S_(t-1) + R(k_t)^T v_t        a = 1 - 2^(-5-h) in head h, from 0; R rotates by the angles of position t
    y_t = (RMSNorm(R(q_t) S_t / sqrt(K)) * silu(g_t)) W_o

The norm is per head. Values are twice as wide as keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.recurrence import MixerShape, RecurrenceInputs, RecurrentSpec, Rule
from layers.registry import BlockContext, register
from layers.rotary import rotate


@register("retention")
@dataclass(frozen=True, kw_only=True)
class RetentionSpec(RecurrentSpec):
    expand_v: float = 2.0

    def shape(self, context: BlockContext) -> MixerShape:
        value = context.width(self.expand_v, option="expand_v")
        return MixerShape(heads=context.heads, key=context.width(even=True), value=value, decay="fixed", gate=F.silu)

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        return partial(retention_rule, context.rope_base)


def retention_rule(
    rope_base: float, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, positions_T: Tensor
) -> RecurrenceInputs:
    q_BTHK, k_BTHK = rotate(positions_T, rope_base, q_BTHK, k_BTHK)
    head_H = torch.arange(q_BTHK.shape[2], device=x_BTD.device, dtype=torch.float64)
    return RecurrenceInputs(q_BTHK, k_BTHK, v_BTHV, torch.log1p(-torch.exp2(-5 - head_H)))
