"""The basic linear attention mixer (arXiv 2006.16236; without a normaliser arXiv 2502.07563, equations 3-4).

    S_t = S_(t-1) + f(k_t)^T v_t        z_t = z_(t-1) + f(k_t)
    y_t = RMSNorm(f(q_t) S_t / sqrt(K)) W_o                   normalize = False; the norm is per head, as in LASP-2
    y_t = (f(q_t) S_t / (f(q_t) z_t)) W_o                     normalize = True, for an f that is never negative

The feature map f is elu+1, relu, softmax over the channels of a head, or the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from layers.recurrence import MixerShape, RecurrenceInputs, RecurrentSpec, Rule
from layers.registry import BlockContext, register, unknown

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu+1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softmax": lambda x: F.softmax(x, dim=-1),  # over the key dim
}


@register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearSpec(RecurrentSpec):
    feature_map: str = "identity"
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.feature_map not in FEATURE_MAPS:
            raise unknown("feature map", self.feature_map, FEATURE_MAPS)
        if self.normalize and self.feature_map == "identity":
            raise ValueError(
                "normalize divides by a sum of features, which must not be negative, and those of feature_map "
                "'identity' can be; set normalize to false, or feature_map to elu+1, relu or softmax"
            )

    def shape(self, context: BlockContext) -> MixerShape:
        return MixerShape(heads=context.heads, key=context.width(), value=context.width(), normalize=self.normalize)

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        return partial(linear_rule, FEATURE_MAPS[self.feature_map])


def linear_rule(
    feature_map: Callable[[Tensor], Tensor],
    x_BTD: Tensor,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    positions_T: Tensor,
) -> RecurrenceInputs:
    return RecurrenceInputs(feature_map(q_BTHK), feature_map(k_BTHK), v_BTHV)
