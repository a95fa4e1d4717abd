"""LASP-2: one all-gather of the spans' summaries forward, one of their gradients backward (arXiv 2502.07563).

Every rank receives what every span does to the state, and folds it. The sizes do not depend on the sequence: per rank
(P-1) * spans * B*H*(K*V + transition) numbers forward, (P-1) * B*H*K*V * (spans + 1 with a final state) backward;
without a mask (P-1) * B*H*K*V both ways.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..comm import collectives
from ..comm.pending import Header, Pending
from ..shard import Shard
from .affine import AffineState, fold_backward, fold_forward, fold_initial, packed, unpacked


class AllGather:
    """One call of a linear operator. `known` holds the log decays [n, ...] of all spans where every rank can compute
    them, and they are not sent; `entered` says whether an initial state is given, `final` whether the state that leaves
    the sequence is wanted."""

    def __init__(self, shard: Shard, known: Tensor | None, entered: bool, final: bool) -> None:
        self.shard, self.known, self.entered, self.final = shard, known, entered, final

    def launch(self, header: Header, state: Tensor, transition: Tensor | None, initial: Tensor | None) -> Pending:
        """Send this rank's summaries, state [s,B,H,K,V] and transition [s,B,H(,K(,K))]; receive those of all spans."""
        sent = AffineState(transition if self.known is None else None, state)

        def unpack(x_Ps: Tensor) -> tuple[AffineState, Tensor | None]:
            transitions, states = unpacked(torch.stack([x_Ps[owner] for owner in self.shard.owners]), sent)
            return AffineState(transitions if self.known is None else self.known, states), initial

        return collectives.start_all_gather(packed(sent), self.shard.sp.group, header).then(unpack)

    def arrive(self, received: tuple[AffineState, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        """States that enter this rank's spans [s,B,H,K,V], the final state, and the transitions for the way back."""
        spans, initial = received
        states = fold_forward(spans, initial)
        return torch.stack([states[i] for i in self.shard.own]), states[-1], spans.transition

    def launch_backward(self, header: Header, d_entering: Tensor, d_final: Tensor, kept: Tensor | None) -> Pending:
        """Send the gradients of this rank's entering states, and of the final state; receive all, the latter summed."""
        sent = torch.cat([d_entering, d_final.unsqueeze(0)]) if self.final else d_entering

        def unpack(x_Ps: Tensor) -> _Gradients:
            d_final_sum = x_Ps[:, -1].sum(0) if self.final else None
            return _Gradients([x_Ps[owner] for owner in self.shard.owners], d_final_sum, d_final)

        return collectives.start_all_gather(sent, self.shard.sp.group, header).then(unpack)

    def arrive_backward(self, received: _Gradients, transitions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of the states that leave this rank's spans, and this rank's part of that of the initial state."""
        own = list(self.shard.own)
        d_leaving_n = fold_backward(transitions, received.d_entering, received.d_final)
        d_leaving = torch.stack([d_leaving_n[i] for i in own])
        d_initial = None
        if self.entered:
            d_own = [received.d_entering[i] for i in own]
            d_initial = fold_initial(transitions, own, d_own, received.d_final_here if self.final else None)
        return d_leaving, d_initial


class _Gradients(NamedTuple):
    """Of the states that enter all spans, of the final state summed over ranks, and this rank's part of the latter."""

    d_entering: list[Tensor]
    d_final: Tensor | None
    d_final_here: Tensor


class AllGatherSum:
    """LASP-2 without a mask: every query reads the sum of all ranks' summaries, whatever the order of the spans."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def launch(self, header: Header, state: Tensor, transition: Tensor | None, initial: Tensor | None) -> Pending:
        """Send the sum [B,H,K,V] over this rank's tokens; receive that over all tokens."""
        return collectives.start_all_gather(state, self.shard.sp.group, header).then(lambda state_P: state_P.sum(0))

    def arrive(self, total: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The state that every query reads. There is no final state."""
        return total, total.new_empty(0), None

    def launch_backward(self, header: Header, d_total: Tensor, d_final: Tensor, kept: Tensor | None) -> Pending:
        """Send this rank's gradient of the sum; receive all ranks'."""
        return self.launch(header, d_total, None, None)

    def arrive_backward(self, d_state: Tensor, kept: Tensor | None) -> tuple[Tensor, None]:
        """The gradient of every rank's summary."""
        return d_state, None
