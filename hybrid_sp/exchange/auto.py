"""The network that decides which exchange of states is the fastest: its measurement, and the choice it leads to.

A link has a latency l (seconds per message) and a bandwidth w (bytes per second). P ranks hold m spans each, n = m P in
all. A state has s bytes, and the transition sent with it t bytes. The file of each strategy gives its seconds. If
strategies take equally long, the choice is the first in the registry.
"""

from __future__ import annotations

import itertools
import statistics
import weakref
from typing import NamedTuple

import torch

from ..comm import collectives, groups, ledger, messages
from ..comm.groups import Group
from ..comm.link import Link
from ..comm.pending import Header

# Bytes of the messages that measure a link. The large one must take much longer than the latency.
SMALL, LARGE = 8, {"cpu": 1 << 20, "cuda": 1 << 26}
REPEATS = 5


class Choice(NamedTuple):
    """The strategy of a linear layer; for "auto" also the link, and the seconds of each, forward and backward."""

    strategy: str
    link: Link | None = None
    seconds: dict[str, float] | None = None


_links: weakref.WeakKeyDictionary[Group, Link] = weakref.WeakKeyDictionary()


def measure_link(group: Group) -> Link:
    """Measure the network between the ranks of a group, once.

    Each rank sends to the next one. All ranks get the longest latency and the least bandwidth that any of them
    measured.
    """
    if group not in _links:
        shift = _Shift(group)
        latency = shift.seconds(SMALL)
        size = LARGE[shift.device.type]
        large = shift.seconds(size)
        bandwidth = size / max(large - latency, large / 2)  # a busy moment may make the small message the slower one
        here = torch.tensor([latency, bandwidth], dtype=torch.float64, device=groups.device(group))
        latencies, bandwidths = collectives.all_gather(here, group, tag="link").T.tolist()
        _links[group] = Link(latency=max(latencies), bandwidth=min(bandwidths))
    return _links[group]


class _Shift:
    """The measured exchange: every rank sends a message to the next rank and receives one from the rank before."""

    def __init__(self, group: Group) -> None:
        self.group, self.device = group, groups.device(group)
        self.numbers = itertools.count()
        self.header = messages.open_exchange(Header(tag="link"), "shift", torch.empty(0), group)

    def seconds(self, size: int) -> float:
        """Time a message of `size` bytes: the median of a few, after one that does not count."""
        x = torch.zeros(size, dtype=torch.uint8, device=self.device)
        return statistics.median([self._once(x) for _ in range(REPEATS + 1)][1:])

    def _once(self, x: torch.Tensor) -> float:
        with ledger.ledger() as book:
            messages.start_shift(x, next(self.numbers), self.group, self.header).wait()
        (row,) = (row for row in book.rows if row.tag == self.header.tag)
        assert row.arrived is not None
        return row.arrived - row.launched
