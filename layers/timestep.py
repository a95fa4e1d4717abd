"""The time step dt of a state space model, and the decay that follows from it (Mamba-2, arXiv 2405.21060)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.precision import keep_wide

RATE_RANGE = (1.0, 16.0)  # of exp(A_log) at the start, uniform
DT_RANGE = (1e-3, 1e-1)  # of softplus(dt_bias) at the start, log-uniform


class TimeStep(nn.Module):
    """Compute dt = softplus(project(x) + dt_bias) and log_decay = -exp(A_log) dt in fp32 (fp64 for fp64).

    Both are [B, T, heads], or [B, T, heads, width] with a `width`. `project` and dt_bias have one channel per number of
    a token; A_log has one number per head. A `lower_bound` below 0 bounds the decay instead, as in Kimi K3:

        log_decay = lower_bound * sigmoid(exp(A_log) (project(x) + dt_bias))
    """

    _apply = keep_wide("A_log", "dt_bias")

    def __init__(self, project: nn.Module, heads: int, width: int | None = None, lower_bound: float = 0.0) -> None:
        super().__init__()
        self.project, self.width, self.lower_bound = project, width, lower_bound
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads * (width or 1)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw time steps log-uniformly in DT_RANGE, for project(x) = 0, and rates uniformly in RATE_RANGE."""
        if self.A_log.is_meta:
            return  # nothing to draw, and torch would import its compiler for it, which takes a second
        rate = torch.rand(self.A_log.shape, generator=generator, dtype=torch.float32)
        self.A_log.copy_(torch.log(RATE_RANGE[0] + (RATE_RANGE[1] - RATE_RANGE[0]) * rate))
        uniform = torch.rand(self.dt_bias.shape, generator=generator, dtype=torch.float32)
        low, high = (math.log(step) for step in DT_RANGE)
        dt = torch.exp(low + (high - low) * uniform)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        step = self.project(x_BTD).to(wide) + self.dt_bias.to(wide)
        rate = self.A_log.to(wide).exp()
        if self.width is not None:
            step, rate = step.unflatten(-1, (-1, self.width)), rate[:, None]
        dt = F.softplus(step)
        return dt, self.lower_bound * torch.sigmoid(rate * step) if self.lower_bound < 0 else -rate * dt
