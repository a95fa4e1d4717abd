"""The linear attention of Based (arXiv 2402.18668): the exponential of softmax attention to second order.

    y_t = (sum over s <= t of w_ts v_s / sum over s <= t of w_ts) W_o
    w_ts = 1 + x + x^2 / 2        x = q_t . k_s / sqrt(d)

Queries and keys have d = `feature_dim` channels. w is a product of features f(q_t) . f(k_s). Their number is
1 + d + d (d + 1) / 2, 153 for d = 16, because the product of two channels does not depend on their order.
w is at least 1/2, so the weighted mean needs no output norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from layers.mixers.linear import linear_rule
from layers.recurrence import MixerShape, RecurrentSpec, Rule
from layers.registry import BlockContext, at_least, register


@register("based")
@dataclass(frozen=True, kw_only=True)
class BasedSpec(RecurrentSpec):
    feature_dim: int = 16

    def __post_init__(self) -> None:
        at_least(1, "based", feature_dim=self.feature_dim)

    def shape(self, context: BlockContext) -> MixerShape:
        return MixerShape(
            heads=context.heads,
            key=1 + self.feature_dim + pairs(self.feature_dim),
            value=context.width(),
            features=self.feature_dim,
            normalize=True,
            scale=1.0,
        )

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        return partial(linear_rule, taylor_features)


def taylor_features(x_BTHK: Tensor) -> Tensor:
    """Map x to f(x) with f(q) . f(k) = 1 + s + s^2 / 2 for s = q . k / sqrt(K)."""
    scaled = x_BTHK / x_BTHK.shape[-1] ** 0.25
    return torch.cat([torch.ones_like(x_BTHK[..., :1]), scaled, squares(scaled) / 2**0.5], dim=-1)


def squares(x_BTHK: Tensor) -> Tensor:
    """Map x to f(x) with f(q) . f(k) = (q . k)^2: x_i^2, and sqrt(2) x_i x_j for i < j."""
    twice = x_BTHK * 2**0.5
    products = [twice[..., i : i + 1] * x_BTHK[..., i + 1 :] for i in range(x_BTHK.shape[-1] - 1)]
    return torch.cat([x_BTHK.square(), *products], dim=-1)


def pairs(dim: int) -> int:
    """Count the features that `squares` makes of `dim` channels."""
    return dim * (dim + 1) // 2
