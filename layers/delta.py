"""DeltaRule: the rule of the mixers whose state replaces what it holds under a key."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers.norm import l2_norm
from layers.recurrence import RecurrenceInputs
from layers.timestep import TimeStep


class DeltaRule(nn.Module):
    """Queries and keys of length 1, and beta = sigmoid(x W) per head, the share of what is held that is replaced.

    With `negative` beta is twice that: I - beta k k^T then has an eigenvalue between -1 and 1 along k instead of one
    between 0 and 1 (arXiv 2411.12537). `steps` gives the log decay; None: the state does not decay.
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
