"""The scan: states pass through the spans from rank to rank and are folded on the way, in ring, pipeline and doubling.

Forward and backward are one scan of affine maps x -> T_p x + b_p over positions p = 0 ... n-1:

    forward     position p is span p:        T = A,    b = B,      x_0 = S_0,       the last map gives S_final
    backward    position p is span n-1-p:    T = A^T,  b = dS_in,  x_0 = dS_final,  the last map gives dS_0

The value that enters a position is the state that enters its span, or the gradient of the state that leaves it. A
`ScanAlgorithm` brings the values there. Before the backward scan every rank sends dS_final to the owner of the last
span. After the forward scan that owner sends S_final to every rank. Every rank has S_0. The owner of span 0 keeps all
of dS_0; the parts of the other ranks are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..comm import groups, messages
from ..comm.background import run_in_background
from ..comm.groups import Group
from ..comm.link import Link
from ..comm.pending import Header, Pending
from ..shard import Shard
from .affine import AffineState, span
from .strategy import Request, Sizes


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The description of one scan on this rank.

    owners        the rank of each position; both ends of a message compute from it that the message is due
    maps          the maps of this rank's positions, in the order of the scan
    known_decays  log decays [n, ...] of all positions, where every rank can compute them
    needs_last    the owner of the last position needs the value that leaves it
    """

    owners: tuple[int, ...]
    maps: dict[int, AffineState]
    known_decays: Tensor | None
    needs_last: bool
    group: Group
    header: Header

    @property
    def here(self) -> int:
        return groups.rank(self.group)

    @property
    def like(self) -> Tensor:
        """Return a tensor of the shape of a state."""
        return next(iter(self.maps.values())).state

    # Messages to and from ranks of the group. NCCL needs any two ranks to make theirs in one order.

    def send(self, x: Tensor, to: int, number: int) -> Pending:
        return messages.start_send(x, to, number, self.group, self.header)

    def receive(self, like: Tensor, source: int, number: int) -> Pending:
        return messages.start_receive(like, source, number, self.group, self.header)


class ScanAlgorithm(Protocol):
    """The contract of an algorithm that runs a scan over ranks.

    The constructor posts every receive whose sender is known by then. All ranks construct it at the same point of the
    program (`messages.early`). It numbers its messages from the number of ranks on; `ScanExchange` uses the numbers
    below.
    """

    def run(self, first: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """Return the values that enter this rank's positions, and the one that leaves the last position.

        The latter is None unless this rank owns the last position and `Scan.needs_last`. `first` enters position 0;
        only its owner needs it.
        """


class ScanExchange:
    """The exchange of one call by a scan each way.

    In the background, a thread drives it while the operator computes. Otherwise the caller that waits for it drives it.
    """

    def __init__(
        self,
        shard: Shard,
        request: Request,
        *,
        name: str,
        algorithm: Callable[[Scan], ScanAlgorithm],
        background: bool,
    ) -> None:
        self.shard, self.request = shard, request
        self.name, self.algorithm, self.background = name, algorithm, background

    def launch(self, header: Header, state: Tensor, transition: Tensor | None, initial: Tensor | None) -> Pending:
        """Pass states on, from this rank's summaries: state [s,B,H,K,V] and transition [s,B,H(,K(,K))]."""
        # 1. Make each of this rank's spans a map x -> A x + B, at the position of the span.
        own, state, known = list(self.shard.own), state.detach(), self.request.known_decays
        transition = transition if known is None else known[own]
        transition = None if transition is None else transition.detach()
        scan = self._scan(header, own, state, transition, known, self.request.needs_final_state)
        algorithm = messages.early(scan.group, lambda: self.algorithm(scan))

        def run() -> tuple[Tensor, Tensor, Tensor | None]:
            # 2. Run the scan from S_0.
            entering, leaving = algorithm().run(initial)
            # 3. Send S_final from the owner of the last span to every rank.
            final = _broadcast_final(scan, leaving) if self.request.needs_final_state else state.new_empty(0)
            return torch.stack(entering), final, transition

        return self._launched(run, header, state)

    def receive(self, received: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the states that enter this rank's spans [s,B,H,K,V], the final state, and this rank's transitions."""
        return received

    def launch_backward(self, header: Header, d_entering: Tensor, d_final: Tensor, kept: Tensor | None) -> Pending:
        """Pass gradients of states on, from those of this rank's entering states."""
        # 1. Reverse the spans, and make each a map x -> A^T x + dS_in.
        positions = [self.shard.span_count - 1 - i for i in reversed(self.shard.own)]
        transposed = None if kept is None else (kept.mT if kept.ndim == d_entering.ndim else kept).flip(0)
        known, entered = self.request.known_decays, self.request.has_initial_state
        known = None if known is None else known.flip(0)
        scan = self._scan(header, positions, d_entering.flip(0), transposed, known, entered)
        # 2. Start the sum of dS_final at the owner of the last span.
        needs_final = self.request.needs_final_state
        summed = messages.early(scan.group, lambda: _reduce_final(scan, d_final) if needs_final else None)
        algorithm = messages.early(scan.group, lambda: self.algorithm(scan))

        def run() -> tuple[Tensor, Tensor | None]:
            # 3. Run the scan from dS_final.
            d_last, made = summed(), algorithm()
            d_leaving, d_initial = made.run(None if d_last is None else d_last.wait())
            # 4. Keep dS_0 at the owner of span 0; the other ranks' parts are zero.
            if entered and d_initial is None:
                d_initial = torch.zeros_like(d_leaving[0])
            return torch.stack(d_leaving[::-1]), d_initial

        return self._launched(run, header, d_entering)

    def receive_backward(
        self, received: tuple[Tensor, Tensor | None], kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the states that leave this rank's spans, and its part of the initial state's."""
        return received

    def _scan(
        self,
        header: Header,
        positions: list[int],
        states: Tensor,
        transitions: Tensor | None,
        known_decays: Tensor | None,
        needs_last: bool,
    ) -> Scan:
        group, owners = self.shard.sp.group, tuple(rank for rank, _ in self.shard.owners)
        header = messages.open_exchange(header, self.name, states, group)
        maps = [span(AffineState(transitions, states), slot) for slot in range(len(states))]
        return Scan(
            owners=owners if header.direction == "forward" else owners[::-1],
            maps=dict(zip(positions, maps, strict=True)),
            known_decays=known_decays,
            needs_last=needs_last,
            group=group,
            header=header,
        )

    def _launched(self, run: Callable[[], Any], header: Header, x: Tensor) -> Pending:
        what = header.text(self.name, x)
        return run_in_background(run, what, header, x.device) if self.background else Pending(run, what=what)


def _reduce_final(scan: Scan, d_final: Tensor) -> Pending:
    """Launch the sum of dS_final at the owner of the position that it enters, in rank order; None elsewhere."""
    owner = scan.owners[0]
    if scan.here != owner:
        return scan.send(d_final, owner, scan.here).then(lambda _: None)
    ranks = range(groups.size(scan.group))
    arriving = [Pending(lambda: d_final) if rank == owner else scan.receive(d_final, rank, rank) for rank in ranks]

    def total() -> Tensor:
        d_finals = [message.wait() for message in arriving]
        return sum(d_finals[1:], d_finals[0])

    return Pending(total)


def _broadcast_final(scan: Scan, leaving: Tensor | None) -> Tensor:
    """Send the value that leaves the last position from its owner to all other ranks."""
    if leaving is None:
        received: Tensor = scan.receive(scan.like, scan.owners[-1], scan.here).wait()
        return received
    others = [rank for rank in range(groups.size(scan.group)) if rank != scan.here]
    for send in [scan.send(leaving, rank, rank) for rank in others]:
        send.wait()
    return leaving


def final_bytes(sizes: Sizes, rank: int) -> tuple[int, int]:
    """Return the bytes of a final state that a rank receives, forward and backward.

    Forward, the owner of the last span sends S_final to all others. Backward, it receives dS_final of each.
    """
    if not sizes.final:
        return 0, 0
    return (0, (sizes.ranks - 1) * sizes.state) if rank == sizes.last_owner else (sizes.state, 0)


def final_seconds(link: Link, sizes: Sizes) -> float:
    """Return the time of a final state: the owner of the last span exchanges P-1 states with the others, each way."""
    return 2 * link.seconds(1, (sizes.ranks - 1) * sizes.state) if sizes.final else 0.0
