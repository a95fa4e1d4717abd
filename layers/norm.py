"""The norms of heads: RMSNorm of the output of a recurrence, and the L2 norm of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadNorm(nn.Module):
    """Apply RMSNorm to o_BTHV over groups of `together` heads.

    The weight has the channels of `weights` heads. With `weights` = `together` all groups share it, and with the number
    of heads each group has its own. torch takes the RMS in fp32 (fp64 for fp64) and rounds once.
    """

    def __init__(self, together: int, weights: int, width: int, eps: float) -> None:
        super().__init__()
        self.together, self.eps = together, eps
        self.weight = nn.Parameter(torch.ones(weights * width))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the weight to ones."""
        self.weight.fill_(1.0)

    def forward(self, o_BTHV: Tensor) -> Tensor:
        groups = o_BTHV.unflatten(2, (-1, self.together)).flatten(3)  # [B, T, groups, together * V]
        shape = groups.shape[-1:]
        if self.weight.numel() == shape[0]:
            normed = F.rms_norm(groups, shape, self.weight, self.eps)
        else:
            normed = F.rms_norm(groups, shape, None, self.eps) * self.weight.view(groups.shape[2:])
        return normed.view_as(o_BTHV)


def l2_norm(x_BTHK: Tensor) -> Tensor:
    """Compute x / sqrt(sum of x^2 over K + 1e-6) in fp32 (fp64 for fp64) and round once."""
    wide = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x_BTHK.dtype)
