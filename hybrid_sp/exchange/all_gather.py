"""The exchange of LASP-2 (arXiv 2502.07563): one all-gather of summaries forward, one of their gradients backward.

A summary is the pair (transition, state) of a span. Every rank receives all of them, and folds those before its spans.
The sizes do not depend on the length of the sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..comm import collectives
from ..comm.link import Link
from ..comm.pending import Header, Pending
from ..shard import Shard
from .affine import AffineState, fold_backward, fold_forward, fold_initial, packed, unpacked
from .strategy import Request, Sizes, Strategy


class AllGather:
    """The exchange of one call."""

    def __init__(self, shard: Shard, request: Request) -> None:
        self.shard, self.request = shard, request

    def launch(self, header: Header, state: Tensor, transition: Tensor | None, initial: Tensor | None) -> Pending:
        """Send this rank's summaries, state [s,B,H,K,V] and transition [s,B,H(,K(,K))]."""
        known = self.request.known_decays
        # 1. Gather the summaries of all spans. Decays that every rank knows are not sent.
        sent = AffineState(transition if known is None else None, state)

        def unpack(x_Ps: Tensor) -> tuple[AffineState, Tensor | None]:
            transitions, states = unpacked(torch.stack([x_Ps[owner] for owner in self.shard.owners]), sent)
            return AffineState(transitions if known is None else known, states), initial

        return collectives.start_all_gather(packed(sent), self.shard.sp.group, header).then(unpack)

    def receive(self, received: tuple[AffineState, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the states that enter this rank's spans [s,B,H,K,V], the final state, and the transitions."""
        spans, initial = received
        # 2. Fold them in sequence order; keep the states that enter this rank's spans.
        states = fold_forward(spans, initial)
        return torch.stack([states[i] for i in self.shard.own]), states[-1], spans.transition

    def launch_backward(self, header: Header, d_entering: Tensor, d_final: Tensor, kept: Tensor | None) -> Pending:
        """Send the gradients of this rank's entering states and of the final state, which is summed."""
        final = self.request.needs_final_state
        # 3. Gather the gradients of the states that enter all spans.
        sent = torch.cat([d_entering, d_final.unsqueeze(0)]) if final else d_entering

        def unpack(x_Ps: Tensor) -> _Gradients:
            d_entering_n = [x_Ps[owner] for owner in self.shard.owners]
            return _Gradients(d_entering_n, x_Ps[:, -1].sum(0), d_final) if final else _Gradients(d_entering_n)

        return collectives.start_all_gather(sent, self.shard.sp.group, header).then(unpack)

    def receive_backward(self, received: _Gradients, transitions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the states that leave this rank's spans, and its part of the initial state's."""
        own = list(self.shard.own)
        # 4. Fold them from the last span back; keep the gradients of the states that leave this rank's spans.
        d_leaving_n = fold_backward(transitions, received.d_entering, received.d_final)
        d_leaving = torch.stack([d_leaving_n[i] for i in own])
        if not self.request.has_initial_state:
            return d_leaving, None
        d_own = [received.d_entering[i] for i in own]
        return d_leaving, fold_initial(transitions, own, d_own, received.d_final_here)


class _Gradients(NamedTuple):
    """The gradients of the states that enter all spans, of the final state summed over ranks, and this rank's part."""

    d_entering: list[Tensor]
    d_final: Tensor | None = None
    d_final_here: Tensor | None = None


def received(sizes: Sizes, rank: int) -> tuple[int, int]:
    """Return (P-1) m (s + t) bytes forward; backward (P-1) (m + 1) s with a final state, else (P-1) m s."""
    others = sizes.ranks - 1
    forward = others * sizes.spans * (sizes.state + sizes.transition)
    return forward, others * (sizes.spans + sizes.final) * sizes.state


def seconds(link: Link, sizes: Sizes) -> float:
    """Return the time of P-1 steps each way, with the bytes of `received`."""
    return link.seconds(2 * (sizes.ranks - 1), sum(received(sizes, 0)))


STRATEGY = Strategy("all-gather of states, LASP-2", AllGather, received, seconds)


class AllGatherSum:
    """The unmasked exchange of LASP-2: every query reads the sum of all summaries, (P-1) B*H*K*V numbers each way."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def launch(self, header: Header, state: Tensor, transition: Tensor | None, initial: Tensor | None) -> Pending:
        """Send the sum [B,H,K,V] over this rank's tokens; receive that over all tokens."""
        return collectives.start_all_gather(state, self.shard.sp.group, header).then(lambda state_P: state_P.sum(0))

    def receive(self, total: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the state that every query reads. There is no final state."""
        return total, total.new_empty(0), None

    def launch_backward(self, header: Header, d_total: Tensor, d_final: Tensor, kept: Tensor | None) -> Pending:
        """Send this rank's gradient of the sum; receive all ranks'."""
        return self.launch(header, d_total, None, None)

    def receive_backward(self, d_state: Tensor, kept: Tensor | None) -> tuple[Tensor, None]:
        """Return the gradient of every rank's summary."""
        return d_state, None
