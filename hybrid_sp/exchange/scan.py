"""States that pass through the spans from rank to rank, folded on the way: what ring, pipeline and doubling share.

Forward and backward are one scan of affine maps x -> T_p x + b_p over positions p = 0 ... n-1:

    forward     position p is span p:        T = A,    b = B,      x_0 = S_0,       what leaves the last is S_final
    backward    position p is span n-1-p:    T = A^T,  b = dS_in,  x_0 = dS_final,  what leaves the last is dS_0

The value that enters a position is the state that enters its span, or the gradient of the state that leaves it. A
`Travel` says how the values get there. Around it, the owner of the last span is sent dS_final by every rank before the
backward scan, and sends S_final to every rank after the forward one. Every rank has S_0, and dS_0 stays whole with the
owner of span 0, whose part of it is all there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..comm import background, groups, messages
from ..comm.groups import Group
from ..comm.pending import Header, Pending
from ..shard import Shard
from .affine import AffineState


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One scan, as this rank sees it.

    owners  the rank of each position; both ends of a message compute from it that it is due
    maps    those of this rank's positions, in the order of the scan
    known   log decays [n, ...] of all positions where every rank can compute them
    wanted  whether what leaves the last position is wanted, by its owner
    """

    owners: tuple[int, ...]
    maps: dict[int, AffineState]
    known: Tensor | None
    wanted: bool
    group: Group
    header: Header

    @property
    def here(self) -> int:
        return groups.rank(self.group)

    @property
    def like(self) -> Tensor:
        """A tensor of the shape of a state."""
        return next(iter(self.maps.values())).state

    # Messages to and from ranks of the group. NCCL needs that any two ranks make theirs in one order.

    def send(self, x: Tensor, to: int, number: int) -> Pending:
        return messages.start_send(x, to, number, self.group, self.header)

    def receive(self, like: Tensor, source: int, number: int) -> Pending:
        return messages.start_receive(like, source, number, self.group, self.header)


class Travel(Protocol):
    """A way through a scan. What it can ask for at once it asks for when it is made, by every rank at the same place in
    the program; `run` does the rest, beside other work or when its result is waited for.

    It numbers its messages from the number of ranks on; those below are `Scanned`'s.
    """

    def run(self, first: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """The values that enter this rank's positions, and if it is wanted and here what leaves the last one; `first`
        enters position 0, and its owner alone is asked for it."""


class Scanned:
    """The exchange of one call of a linear operator by a scan each way. `known`, `entered` and `final` are those of
    `AllGather`. With `aside` a thread drives it while the operator computes, else whoever waits for its result."""

    def __init__(
        self,
        shard: Shard,
        known: Tensor | None,
        entered: bool,
        final: bool,
        *,
        name: str,
        travel: Callable[[Scan], Travel],
        aside: bool,
    ) -> None:
        self.shard, self.known, self.entered, self.final = shard, known, entered, final
        self.name, self.travel, self.aside = name, travel, aside

    def launch(self, header: Header, state: Tensor, transition: Tensor | None, initial: Tensor | None) -> Pending:
        """Pass states on, from this rank's summaries, state [s,B,H,K,V] and transition [s,B,H(,K(,K))]."""
        own, state = list(self.shard.own), state.detach()
        transition = transition if self.known is None else self.known[own]
        transition = None if transition is None else transition.detach()
        scan = self._scan(header, own, state, transition, self.known, self.final)
        travel = self.travel(scan)

        def run() -> tuple[Tensor, Tensor, Tensor | None]:
            entering, leaving = travel.run(initial)
            final = _told(scan, leaving) if self.final else state.new_empty(0)
            return torch.stack(entering), final, transition

        return self._launched(run, header, state)

    def arrive(self, received: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        """States that enter this rank's spans [s,B,H,K,V], the final state, and this rank's transitions."""
        return received

    def launch_backward(self, header: Header, d_entering: Tensor, d_final: Tensor, kept: Tensor | None) -> Pending:
        """Pass gradients of states on, from those of this rank's entering states."""
        count = self.shard.span_count
        positions = [count - 1 - i for i in reversed(self.shard.own)]
        transposed = None if kept is None else (kept.mT if kept.ndim == d_entering.ndim else kept).flip(0)
        known = None if self.known is None else self.known.flip(0)
        scan = self._scan(header, positions, d_entering.flip(0), transposed, known, self.entered)
        summed = _Summed(scan, d_final) if self.final else None
        travel = self.travel(scan)

        def run() -> tuple[Tensor, Tensor | None]:
            d_leaving, d_initial = travel.run(None if summed is None else summed.wait())
            if self.entered and d_initial is None:
                d_initial = torch.zeros_like(d_leaving[0])
            return torch.stack(d_leaving[::-1]), d_initial

        return self._launched(run, header, d_entering)

    def arrive_backward(
        self, received: tuple[Tensor, Tensor | None], kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the states that leave this rank's spans, and its part of that of the initial state."""
        return received

    def _scan(
        self,
        header: Header,
        positions: list[int],
        states: Tensor,
        transitions: Tensor | None,
        known: Tensor | None,
        wanted: bool,
    ) -> Scan:
        group, owners = self.shard.sp.group, tuple(rank for rank, _ in self.shard.owners)
        header = messages.open_exchange(header, self.name, states, group)
        maps = [
            AffineState(None if transitions is None else transitions[slot], state) for slot, state in enumerate(states)
        ]
        return Scan(
            owners=owners if header.direction == "forward" else owners[::-1],
            maps=dict(zip(positions, maps, strict=True)),
            known=known,
            wanted=wanted,
            group=group,
            header=header,
        )

    def _launched(self, run: Callable[[], Any], header: Header, x: Tensor) -> Pending:
        what = header.text(self.name, x)
        return background.run_in_background(run, what, header, x.device) if self.aside else Pending(run, what=what)


class _Summed:
    """dS_final, summed over ranks by the rank that it enters."""

    def __init__(self, scan: Scan, mine: Tensor) -> None:
        self.mine, owner = mine, scan.owners[0]
        ranks = range(groups.size(scan.group))
        self.here = scan.here == owner
        self.sends = [] if self.here else [scan.send(mine, owner, scan.here)]
        self.arriving = [None if rank == owner else scan.receive(mine, rank, rank) for rank in ranks if self.here]

    def wait(self) -> Tensor | None:
        """The sum, in the order of the ranks; None elsewhere."""
        for send in self.sends:
            send.wait()
        parts = [self.mine if part is None else part.wait() for part in self.arriving]
        return sum(parts[1:], parts[0]) if self.here else None


def _told(scan: Scan, leaving: Tensor | None) -> Tensor:
    """What leaves the last position: its owner tells all other ranks."""
    if leaving is None:
        received: Tensor = scan.receive(scan.like, scan.owners[-1], scan.here).wait()
        return received
    others = [rank for rank in range(groups.size(scan.group)) if rank != scan.here]
    for send in [scan.send(leaving, rank, rank) for rank in others]:
        send.wait()
    return leaving
