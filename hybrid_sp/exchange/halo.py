"""The exchange of a convolution: the few tokens before each span, from the ranks that hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..comm.pending import Header, Pending
from .fetch import FetchPlan


class Halo:
    """The exchange of the tokens of x [B,T,D] that a plan asks for; they arrive in `dtype`.

    `own` holds the gradient of this rank's own use of x. The gradients that other ranks return are added to it in the
    precision of sums, and the total is rounded once.
    """

    def __init__(self, plan: FetchPlan, x: Tensor, dtype: torch.dtype) -> None:
        self.plan, self.shape, self.dtype = plan, x.shape, dtype
        self.own: Tensor | None = None

    def launch(self, header: Header, x: Tensor, transition: Tensor | None, initial: Tensor | None) -> Pending:
        """Send the tokens of x that other ranks read."""
        return self.plan.fetch(header, self.plan.pick(x))

    def receive(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the tokens of this rank's ranges [B,rows,D]. There is no final state: it is one of the ranges."""
        return rows.to(self.dtype).transpose(0, 1), rows.new_empty(0), None

    def launch_backward(self, header: Header, d_rows: Tensor, d_final: Tensor, kept: Tensor | None) -> Pending:
        """Send the gradients of the tokens to their owners."""
        self.own = None  # an earlier pass may have failed before the gradient of x
        return self.plan.give_back(header, d_rows.transpose(0, 1))

    def receive_backward(self, received: Tensor, kept: Tensor | None) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        dx = received.new_zeros(self.shape) if self.own is None else self.own  # None: only the rows reached the loss
        self.own = None
        self.plan.add(dx, received)
        return dx, None
