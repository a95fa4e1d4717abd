"""The Mamba-2 mixer, structured state space duality (arXiv 2405.21060).

    S_t = a_t S_(t-1) + B_t^T (dt_t x_t)    log a_t = -exp(A_log) dt_t    dt_t = softplus(u_t W_dt + dt_bias) per head
    y_t = RMSNorm((C_t S_t + D x_t) * silu(z_t)) W_o

u is the mixer's input, from which x, B, C and z are projected. x, B and C are the value, key and query of other linear
mixers, and pass through a short convolution with bias and SiLU. The heads of a group share B and C. The norm is over
the channels of a group, and may be left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.recurrence import MixerShape, RecurrenceInputs, RecurrentSpec, Rule
from layers.registry import BlockContext, at_least, register
from layers.timestep import TimeStep


@register("mamba2")
@dataclass(frozen=True, kw_only=True)
class Mamba2Spec(RecurrentSpec):
    conv: int = 4
    expand: float = 2.0
    state: int = 128  # channels of B and C in a head
    groups: int = 1
    norm: bool = True  # of the gated output; Falcon-H1 has none

    def __post_init__(self) -> None:
        at_least(1, "mamba2", state=self.state, groups=self.groups)

    def shape(self, context: BlockContext) -> MixerShape:
        return MixerShape(
            heads=context.heads,
            key=self.state,
            value=context.width(self.expand),
            groups=context.groups(self.groups, option="groups"),
            conv_bias=True,
            decay="scalar",
            scale=1.0,
            gate=F.silu,
            gate_first=True,
            norm="group" if self.norm else "none",
        )

    def rule(self, context: BlockContext, shape: MixerShape) -> Rule:
        return Mamba2Rule(context)


class Mamba2Rule(nn.Module):
    def __init__(self, context: BlockContext) -> None:
        super().__init__()
        self.steps = TimeStep(nn.Linear(context.dim, context.heads, bias=False), context.heads)
        self.D = nn.Parameter(torch.ones(context.heads))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set D to ones."""
        self.D.fill_(1.0)

    def forward(
        self, x_BTD: Tensor, C_BTGK: Tensor, B_BTGK: Tensor, x_BTHV: Tensor, positions_T: Tensor
    ) -> RecurrenceInputs:
        dt_BTH, log_decay_BTH = self.steps(x_BTD)
        v_BTHV = (dt_BTH[..., None] * x_BTHV).to(x_BTHV.dtype)
        return RecurrenceInputs(C_BTGK, B_BTGK, v_BTHV, log_decay_BTH, skip=self.D[:, None] * x_BTHV)
