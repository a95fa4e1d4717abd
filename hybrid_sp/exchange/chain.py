"""The chain: one state goes from span to span, and each folds itself in. It serves LASP's ring and ZeCO's All-Scan.

    ring        the whole state at once (LASP, arXiv 2404.02882)
    pipeline    in blocks of its value channels, on which T acts one by one: a rank folds a block and sends it on while
                the next one is on its way (ZeCO, arXiv 2507.01004)

Between two spans of one rank there is no message (under zigzag, from span P-1 to P). Forward, a rank receives one state
for each of its spans that another rank's span precedes. Backward, it receives one for each that another's span follows.
Transitions never travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..comm import groups
from ..comm.link import Link
from ..comm.pending import Pending
from ..shard import neighbours
from .affine import AffineState, compose
from .scan import Scan, ScanExchange, final_bytes, final_seconds
from .strategy import Sizes, Strategy

BLOCKS = 4  # blocks of a state in the pipeline


class Chain:
    """Pass values on in `blocks` blocks, position by position. See `scan.ScanAlgorithm`.

    A rank asks for the value that enters a position after it has sent the value that left its position before. This
    keeps the messages between two ranks in one order.
    """

    def __init__(self, scan: Scan, *, blocks: int) -> None:
        self.scan, self.blocks = scan, min(blocks, scan.like.shape[-1])
        position = min(scan.maps)
        self.asked = {position: self._ask(position)}

    def run(self, first: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        scan, end = self.scan, len(self.scan.owners) - 1
        entering: list[Tensor] = []
        leaving: list[Tensor] = []
        sends: list[Pending] = []
        for position, (transition, state) in scan.maps.items():
            # 1. Take the blocks of the value that enters the position.
            arriving = self._entering(position, first, leaving)
            entered, leaving = [], []
            for block, (x, b) in enumerate(zip(arriving, self._cut(state), strict=True)):
                entered.append(x)
                # 2. Fold the position's map into a block: T x + b.
                if position < end or scan.needs_last:
                    leaving.append(compose(AffineState(transition, b), AffineState(None, x)).state)
                # 3. Send the block on, while the next one is on its way.
                if position < end and scan.owners[position + 1] != scan.here:
                    sends.append(scan.send(leaving[-1], scan.owners[position + 1], self._number(position + 1, block)))
            entering.append(torch.cat(entered, -1))
        for send in sends:
            send.wait()
        return entering, torch.cat(leaving, -1) if end in scan.maps and scan.needs_last else None

    def _entering(self, position: int, first: Tensor | None, leaving: Sequence[Tensor]) -> Iterable[Tensor]:
        """Yield the blocks of the value that enters a position; wait for those of messages one by one."""
        if position == 0:
            return self._cut(torch.zeros_like(self.scan.like) if first is None else first)
        if self.scan.owners[position - 1] == self.scan.here:
            return leaving
        return (message.wait() for message in self.asked.get(position) or self._ask(position))

    def _ask(self, position: int) -> list[Pending]:
        """Ask for the value that enters a position, if another rank sends it."""
        source = self.scan.owners[position - 1] if position else self.scan.here
        if source == self.scan.here:
            return []
        return [
            self.scan.receive(like, source, self._number(position, block))
            for block, like in enumerate(self._cut(self.scan.like))
        ]

    def _cut(self, x: Tensor) -> Sequence[Tensor]:
        return x.tensor_split(self.blocks, -1)

    def _number(self, position: int, block: int) -> int:
        return groups.size(self.scan.group) + position * self.blocks + block


def received(sizes: Sizes, rank: int) -> tuple[int, int]:
    """Return h s bytes and those of a final state.

    h counts the rank's spans that another rank's span precedes; in backward, those that another rank's span follows.
    """
    before, after = neighbours(rank, sizes.ranks, sizes.layout)
    final, d_final = final_bytes(sizes, rank)
    return before * sizes.state + final, after * sizes.state + d_final


def seconds(link: Link, sizes: Sizes, *, blocks: int) -> float:
    """Return the time of h + m (b-1) turns each way, in b blocks of s / b bytes; h counts hops between ranks."""
    turns = sizes.hops + sizes.spans * (blocks - 1)
    return 2 * link.seconds(turns, turns * sizes.state / blocks) + final_seconds(link, sizes)


def _strategy(label: str, name: str, blocks: int, background: bool) -> Strategy:
    make = partial(ScanExchange, name=name, algorithm=partial(Chain, blocks=blocks), background=background)
    return Strategy(label, make, received, partial(seconds, blocks=blocks))


RING = _strategy("ring of states, LASP-1", "ring", 1, background=False)
PIPELINE = _strategy("ring of states in blocks, ZeCO", "pipeline", BLOCKS, background=True)
