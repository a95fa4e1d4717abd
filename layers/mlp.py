"""The dense feed-forward parts of a block: SwiGLU (arXiv 2002.05202), and the squared ReLU (arXiv 2109.08668)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Compute y = (silu(x W_gate) * x W_up) W_output. One matrix product makes both input projections."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(dim, 2 * width, bias=False)
        self.output = nn.Linear(width, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.input(x_BTD).chunk(2, dim=-1)
        return self.output(F.silu(gate) * up)


class SquaredReLU(nn.Module):
    """Compute y = relu(x W_input)**2 W_output."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(dim, width, bias=False)
        self.output = nn.Linear(width, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.output(F.relu(self.input(x_BTD)).square())


MLPS = {"swiglu": SwiGLU, "relu2": SquaredReLU}
