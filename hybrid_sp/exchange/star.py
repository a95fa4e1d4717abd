"""The star: rank 0 receives all summaries, folds them, and sends each rank the states that enter its spans.

    forward     every rank sends its summaries to rank 0 | rank 0 folds | and sends each rank its entering states
    backward    the same with gradients: dS_in of every span there, dS_out back

It is a baseline. All ranks wait for rank 0, whose link carries everything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..comm import messages
from ..comm.background import run_in_background
from ..comm.link import Link
from ..comm.pending import Header, Pending
from ..shard import Shard
from .affine import AffineState, fold_backward, fold_forward, fold_initial, packed, unpacked
from .strategy import Request, Sizes, Strategy

CENTRE = 0  # the rank that folds


class Star:
    """The exchange of one call. A thread drives it while the operator computes."""

    def __init__(self, shard: Shard, request: Request) -> None:
        self.shard, self.request = shard, request
        self.others = [rank for rank in range(shard.sp.size) if rank != CENTRE]

    def launch(self, header: Header, state: Tensor, transition: Tensor | None, initial: Tensor | None) -> Pending:
        """Send this rank's summaries, state [s,B,H,K,V] and transition [s,B,H(,K(,K))], to the centre."""
        known, final = self.request.known_decays, self.request.needs_final_state
        sent = AffineState(transition if known is None else None, state.detach())
        transitions: list[Tensor | None] = [None]

        def fold(rows: Tensor) -> tuple[list[Tensor], Tensor | None]:
            spans = unpacked(rows, sent)
            transitions[0] = spans.transition if known is None else known
            *entering, last = fold_forward(AffineState(transitions[0], spans.state), initial)
            return entering, last if final else None

        def finish(own: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            return own, state.new_empty(0) if last is None else last, transitions[0]

        return self._round(header, packed(sent), fold, final, state, finish)

    def receive(self, received: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the states that enter this rank's spans, the final state, and at the centre all transitions."""
        return received

    def launch_backward(self, header: Header, d_entering: Tensor, d_final: Tensor, kept: Tensor | None) -> Pending:
        """Send the gradients of this rank's entering states, and of the final state, to the centre."""
        needs_final = self.request.needs_final_state
        sent = torch.cat([d_entering, d_final.unsqueeze(0)]) if needs_final else d_entering
        d_initial = torch.zeros_like(d_entering[0]) if self.request.has_initial_state else None

        def fold(rows: Tensor) -> tuple[list[Tensor], None]:
            nonlocal d_initial
            d_spans = list(rows[: self.shard.span_count])
            d_last = rows[self.shard.span_count :].sum(0) if needs_final else None  # one row per rank
            if d_initial is not None:
                d_initial = fold_initial(kept, range(self.shard.span_count), d_spans, d_last)
            return fold_backward(kept, d_spans, d_last), None

        assert len(d_entering) == len(self.shard.own)
        return self._round(header, sent, fold, False, d_entering, lambda own, _: (own, d_initial))

    def receive_backward(
        self, received: tuple[Tensor, Tensor | None], kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the states that leave this rank's spans, and at the centre the initial state's."""
        return received

    def _round(
        self,
        header: Header,
        sent: Tensor,
        fold: Callable[[Tensor], tuple[list[Tensor], Tensor | None]],
        with_last: bool,
        like: Tensor,
        finish: Callable[[Tensor, Tensor | None], tuple[Tensor | None, ...]],
    ) -> Pending:
        """Collect rows at the centre, fold those of all spans there, and send each rank the results of its spans."""
        sp, ranks = self.shard.sp, self.shard.sp.size
        header = messages.open_exchange(header, "star", sent, sp.group)
        group, m = sp.group, len(self.shard.own)
        if sp.rank != CENTRE:
            # 1. Send this rank's rows, and ask for its results.
            answer = like.new_empty(m + with_last, *like.shape[1:])

            def post() -> tuple[Pending, Pending]:
                send = messages.start_send(sent, CENTRE, sp.rank, group, header)
                return send, messages.start_receive(answer, CENTRE, ranks + sp.rank, group, header)

            posted = messages.early(group, post)

            def wait() -> tuple[Tensor | None, ...]:
                send, asked = posted()
                send.wait()
                results = asked.wait()
                return finish(results[:m], results[m] if with_last else None)

            return run_in_background(wait, header.text("star", sent), header, sent.device)
        arriving = messages.early(
            group, lambda: {rank: messages.start_receive(sent, rank, rank, group, header) for rank in self.others}
        )

        def serve() -> tuple[Tensor | None, ...]:
            # 2. Bring the rows of all ranks into the order of the sequence.
            rows = {rank: message.wait() for rank, message in arriving().items()} | {CENTRE: sent}
            in_order = [rows[rank][slot] for rank, slot in self.shard.owners]
            in_order += [rows[rank][m] for rank in range(ranks) if len(sent) > m]
            # 3. Fold once, for all ranks.
            results, last = fold(torch.stack(in_order))
            extra = [] if last is None else [last]
            # 4. Send each rank the results of its spans.
            sends = [
                messages.start_send(torch.stack(self._of(rank, results) + extra), rank, ranks + rank, group, header)
                for rank in self.others
            ]
            for message in sends:
                message.wait()
            return finish(torch.stack(self._of(CENTRE, results)), last)

        return run_in_background(serve, header.text("star", sent), header, sent.device)

    def _of(self, rank: int, results: list[Tensor]) -> list[Tensor]:
        """Return the results of a rank's spans."""
        return [result for result, (owner, _) in zip(results, self.shard.owners, strict=True) if owner == rank]


def received(sizes: Sizes, rank: int) -> tuple[int, int]:
    """Return the bytes of the centre, or of another rank, forward and backward.

    The centre receives (P-1) m (s + t) bytes forward and (P-1) m s backward; another rank receives m s each way. A
    final state adds s: forward at every rank but the centre, backward at the centre from every other rank.
    """
    state, spans = sizes.state, sizes.spans
    if rank == CENTRE:
        others = sizes.ranks - 1
        return others * spans * (state + sizes.transition), others * (spans + sizes.final) * state
    return (spans + sizes.final) * state, spans * state


def seconds(link: Link, sizes: Sizes) -> float:
    """Return the time of two messages each way for the last rank, behind all that the centre receives and sends."""
    others, s, t, m = sizes.ranks - 1, sizes.state, sizes.transition, sizes.spans
    return link.seconds(4, others * (m * (s + t) + (m + sizes.final) * s + (m + sizes.final) * s + m * s))


STRATEGY = Strategy("star of states, folded by one rank", Star, received, seconds, baseline=True)
