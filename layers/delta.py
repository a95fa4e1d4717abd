"""The delta rule: a write replaces the value that the state holds under a key."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers.norm import l2_norm
from layers.recurrence import RecurrenceInputs
from layers.timestep import TimeStep


class DeltaRule(nn.Module):
    """Prepare the inputs of a delta rule: queries and keys of length 1, and beta = sigmoid(x W) per head.

    Beta is the share of the old value that a write replaces. `negative` doubles it. The eigenvalue of I - beta k k^T
    along k is then between -1 and 1 instead of 0 and 1 (arXiv 2411.12537).
    `steps` gives the log decay. With None the state does not decay.
    """

    def __init__(self, dim: int, heads: int, steps: TimeStep | None, *, negative: bool = False) -> None:
        super().__init__()
        self.beta = nn.Linear(dim, heads, bias=False)
        self.steps = steps
        self.limit = 2 if negative else 1

    def forward(
        self, x_BTD: Tensor, q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, positions_T: Tensor
    ) -> RecurrenceInputs:
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        beta_BTH = self.limit * torch.sigmoid(self.beta(x_BTD).to(wide))
        log_decay = None if self.steps is None else self.steps(x_BTD)[1]
        return RecurrenceInputs(l2_norm(q_BTGK), l2_norm(k_BTGK), v_BTHV, log_decay, beta_BTH)
