"""The gated linear attention mixer, GLA (arXiv 2312.06635).

    S_t = diag(a_t) S_(t-1) + k_t^T v_t        log a_t = logsigmoid(x_t W_1 W_2 + b) / 16
    y_t = (RMSNorm(q_t S_t / sqrt(K)) * silu(g_t)) W_o

The norm is per head. W_1 W_2 has rank 16. Keys have half as many channels as the model, values as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layers.precision import keep_wide
from layers.recurrence import MixerShape, RecurrenceInputs, RecurrentSpec, Rule
from layers.registry import BlockContext, at_least, register


@register("gla")
@dataclass(frozen=True, kw_only=True)
class GLASpec(RecurrentSpec):
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_rank: int = 16  # of W_1 W_2
    temperature: float = 16.0

    def __post_init__(self) -> None:
        at_least(1, "gla", gate_rank=self.gate_rank)
        if self.temperature <= 0:
            raise ValueError(f"temperature of gla is {self.temperature}; it must be greater than 0")

    def shape(self, context: BlockContext) -> MixerShape:
        key, value = context.width(self.expand_k, option="expand_k"), context.width(self.expand_v, option="expand_v")
        return MixerShape(heads=context.heads, key=key, value=value, decay="vector", gate=F.silu)

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        return GLARule(self, context.dim, shape.heads * shape.key)


class GLARule(nn.Module):
    _apply = keep_wide("low_rank.1.bias")

    def __init__(self, spec: GLASpec, dim: int, keys: int) -> None:
        super().__init__()
        self.temperature = spec.temperature
        self.low_rank: Sequence[nn.Linear] = nn.ModuleList(  # type: ignore[assignment]
            [nn.Linear(dim, spec.gate_rank, bias=False), nn.Linear(spec.gate_rank, keys)]
        )

    def forward(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, positions_T: Tensor
    ) -> RecurrenceInputs:
        down, up = self.low_rank
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        gate_BTC = F.linear(down(x_BTD), up.weight).to(wide) + up.bias.to(wide)  # fp32 bias, bf16 product
        gate_BTHK = rearrange(gate_BTC, "b t (h k) -> b t h k", h=q_BTHK.shape[2])
        return RecurrenceInputs(q_BTHK, k_BTHK, v_BTHV, F.logsigmoid(gate_BTHK) / self.temperature)
