"""LASP-2: one all-gather of the spans' summaries forward, one of their gradients backward (arXiv 2502.07563).

Every rank receives what every span does to the state, and folds it. The sizes do not depend on the sequence: per rank
(P-1) * spans * B*H*(K*V + transition) numbers forward, (P-1) * B*H*K*V * (spans + 1 with a final state) backward;
without a mask (P-1) * B*H*K*V both ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import collectives
from ..collectives import Header, Pending
from ..state import AffineState, fold_backward, fold_forward, fold_initial, transition_gradient

if TYPE_CHECKING:
    from ..layout import Shard


class AllGather:
    """One call of a linear operator. `known` holds the log decays [n, ...] of all spans where every rank can compute
    them, and they are not sent; `final` says whether the state that leaves the sequence is wanted."""

    def __init__(self, shard: Shard, known: Tensor | None, final: bool) -> None:
        self.shard, self.known, self.final = shard, known, final

    def launch(self, header: Header, state: Tensor, transition: Tensor | None) -> Pending:
        """Send this rank's summaries, state [s,B,H,K,V] and transition [s,B,H(,K(,K))]; receive those of all spans."""
        sent = state.flatten(-2)
        if transition is not None and self.known is None:
            sent = torch.cat([sent, transition.reshape(*sent.shape[:-1], -1)], -1)
        shape = state.shape[-2:]

        def unpack(x_Ps: Tensor) -> AffineState:
            x_n = torch.stack([x_Ps[owner] for owner in self.shard.owners])
            states = x_n[..., : shape.numel()].unflatten(-1, shape)
            transitions = self.known
            if transition is not None and transitions is None:
                transitions = x_n[..., shape.numel() :].reshape(len(x_n), *transition.shape[1:])
            return AffineState(transitions, states)

        return collectives.start_all_gather(sent, self.shard.sp.group, header).then(unpack)

    def arrive(self, spans: AffineState, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """States that enter this rank's spans [s,B,H,K,V], the final state, and the transitions for the way back."""
        states = fold_forward(spans, initial)
        return torch.stack([states[i] for i in self.shard.own]), states[-1], spans.transition

    def launch_backward(self, header: Header, d_entering: Tensor, d_final: Tensor) -> Pending:
        """Send the gradients of this rank's entering states, and of the final state; receive all, the latter summed."""
        sent = torch.cat([d_entering, d_final.unsqueeze(0)]) if self.final else d_entering

        def unpack(x_Ps: Tensor) -> tuple[list[Tensor], Tensor | None]:
            return [x_Ps[owner] for owner in self.shard.owners], x_Ps[:, -1].sum(0) if self.final else None

        return collectives.start_all_gather(sent, self.shard.sp.group, header).then(unpack)

    def arrive_backward(
        self, received: tuple[list[Tensor], Tensor | None], entering: Tensor, transitions: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of this rank's summaries: of the states, and of the log decays (None for dense transitions)."""
        d_leaving_n = fold_backward(transitions, *received)
        d_leaving = torch.stack([d_leaving_n[i] for i in self.shard.own])
        if transitions is None or transitions.ndim == d_leaving.ndim:
            return d_leaving, None
        own = transitions[list(self.shard.own)]
        return d_leaving, transition_gradient(own.expand(*d_leaving.shape[:3], *own.shape[3:]), d_leaving, entering)

    def initial_backward(self, transitions: Tensor | None, d_entering: Tensor, d_final: Tensor) -> Tensor:
        """This rank's part of the gradient of the initial state. Nothing is communicated."""
        return fold_initial(transitions, self.shard.own, list(d_entering), d_final if self.final else None)


class AllGatherSum:
    """LASP-2 without a mask: every query reads the sum of all ranks' summaries, whatever the order of the spans."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def launch(self, header: Header, state: Tensor, transition: Tensor | None) -> Pending:
        """Send the sum [B,H,K,V] over this rank's tokens; receive that over all tokens."""
        return collectives.start_all_gather(state, self.shard.sp.group, header).then(lambda state_P: state_P.sum(0))

    def arrive(self, total: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The state that every query reads. There is no final state."""
        return total, total.new_empty(0), None

    def launch_backward(self, header: Header, d_total: Tensor, d_final: Tensor) -> Pending:
        """Send this rank's gradient of the sum; receive all ranks'."""
        return self.launch(header, d_total, None)

    def arrive_backward(
        self, d_state: Tensor, entering: Tensor, transitions: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of every rank's summary."""
        return d_state, None

    def initial_backward(self, transitions: Tensor | None, d_entering: Tensor, d_final: Tensor) -> Tensor:
        raise AssertionError("without a mask there is no initial state")
