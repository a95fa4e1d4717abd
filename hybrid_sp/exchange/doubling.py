"""The exclusive scan in ceil(log2(n)) rounds of composed summaries, for any n spans (Hillis and Steele, 1986).

At each position p, two windows of positions grow until they reach position 0. W is the composed map of the window that
ends with p. E is that of the window that ends before p.

    round d = 1, 2, 4, ... < n      E_p <- E_p after W_(p-d),   W_p <- W_p after W_(p-d)      for p >= d

A window that has reached position 0 is a value, so only its state is sent. Of other windows the composed transition is
sent too, unless every rank knows the transitions. Backward composes them transposed and in the other order, so they are
sent again.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..comm import groups
from ..comm.link import Link
from ..comm.pending import Pending
from .affine import AffineState, compose, packed, unpacked
from .scan import Scan, ScanExchange, final_bytes, final_seconds
from .strategy import Sizes, Strategy


class Doubling:
    """Compose windows of growing length. See `scan.ScanAlgorithm`."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan

    def run(self, first: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        scan, count = self.scan, len(self.scan.owners)
        start = torch.zeros_like(scan.like) if first is None else first
        # 1. Start with windows of one position. Position 0 becomes a value: fold x_0 in.
        windows = dict(scan.maps)
        if 0 in windows:
            windows[0] = AffineState(None, self._leaving(0, start))
        # 2. In each round, compose every window with the one that ends d positions before it.
        before: dict[int, AffineState] = {}
        for d in (1 << r for r in range((count - 1).bit_length())):
            for p, earlier in self._round(d, windows).items():
                before[p] = compose(before[p], earlier) if p in before else earlier
                if p + 2 * d < count:  # the next round sends it
                    windows[p] = compose(windows[p], earlier)
        # 3. The window that ends before p is now a value: the state that enters p.
        entering = {p: before[p].state if p else start for p in scan.maps}
        # 4. Fold the last position's map in, if its owner needs the value that leaves it.
        last = count - 1
        leaving = self._leaving(last, entering[last]) if last in scan.maps and scan.needs_last else None
        return list(entering.values()), leaving

    def _round(self, d: int, windows: dict[int, AffineState]) -> dict[int, AffineState]:
        """Return the windows that end d positions before this rank's positions.

        All ranks go through all positions in one order, and each makes its own messages.
        """
        scan, count = self.scan, len(self.scan.owners)
        earlier: dict[int, AffineState] = {}
        arriving: dict[int, Pending] = {}
        sends: list[Pending] = []
        # 1. Ask for the windows that this rank needs, and send those that others need.
        for p in range(d, count):
            q, number = p - d, groups.size(scan.group) + d * count + p
            source, to = scan.owners[q], scan.owners[p]
            if source == to == scan.here:
                earlier[p] = windows[q]
            elif to == scan.here:
                arriving[p] = scan.receive(packed(self._sent(q, d, scan.maps[p])), source, number)
            elif source == scan.here:
                sends.append(scan.send(packed(self._sent(q, d, windows[q])), to, number))
        # 2. Unpack windows as they arrive. Known decays are summed here instead of sent.
        for p, message in arriving.items():
            q, like = p - d, scan.maps[p]
            transition, state = unpacked(message.wait(), self._sent(q, d, like))
            if scan.known_decays is not None and q >= d:
                transition = scan.known_decays[q - d + 1 : q + 1].sum(0)
            earlier[p] = AffineState(transition, state)
        for send in sends:
            send.wait()
        return earlier

    def _sent(self, q: int, d: int, window: AffineState) -> AffineState:
        """Return the part to send of the window that ends with q; one that has reached position 0 has no transition."""
        return window if q >= d and self.scan.known_decays is None else AffineState(None, window.state)

    def _leaving(self, position: int, entering: Tensor) -> Tensor:
        return compose(self.scan.maps[position], AffineState(None, entering)).state


def received(sizes: Sizes, rank: int) -> tuple[int, int]:
    """Return the bytes of the windows that a rank receives, and a final state's.

    For each of its positions p and each d = 1, 2, 4 ... <= p, if another rank owns position p - d: s bytes, and t more
    unless p < 2 d. Backward is the same in the other order of spans.
    """
    (forward, backward), (final, d_final) = (_windows(sizes, rank, way) for way in (1, -1)), final_bytes(sizes, rank)
    return forward + final, backward + d_final


def _windows(sizes: Sizes, rank: int, way: int) -> int:
    owners = [sizes.owner(span) for span in range(sizes.ranks * sizes.spans)][::way]
    total = 0
    for p in (p for p, owner in enumerate(owners) if owner == rank):
        far = [d for d in (1 << r for r in range(p.bit_length())) if owners[p - d] != rank]
        total += len(far) * sizes.state + sum(p >= 2 * d for d in far) * sizes.transition
    return total


def seconds(link: Link, sizes: Sizes) -> float:
    """Return the time of R = ceil(log2 n) rounds each way, of m states; R - 1 rounds carry transitions too."""
    m, rounds = sizes.spans, (sizes.ranks * sizes.spans - 1).bit_length()
    bytes_ = m * (rounds * sizes.state + (rounds - 1) * sizes.transition)
    return 2 * link.seconds(rounds, bytes_) + final_seconds(link, sizes)


STRATEGY = Strategy(
    "doubling of composed states",
    partial(ScanExchange, name="doubling", algorithm=Doubling, background=True),
    received,
    seconds,
)
