"""Which exchange of states is the fastest, by a model of the network, and what the network is like.

A link is a latency l (seconds a message) and a bandwidth w (bytes a second). P ranks hold m spans each, of n = m P; a
state has s bytes and the transition that is sent beside it t (0 where every rank knows it). Seconds until the last rank
has what enters its spans, with h = n - m hops between ranks and rounds R = ceil(log2 n):

    all_gather    forward (P-1) (l + m (s + t) / w)                backward (P-1) (l + m s / w)
    ring          h (l + s / w)                                    the same
    pipeline      (h + m (b-1)) (l + s / (b w)), in b blocks       the same
    doubling      R l + m (R s + r t) / w                          the same

where of the R rounds r = R - 1 send transitions, at most: the last one sends values. A final state adds s to each of
the P-1 steps of all_gather's backward, and to each way of the others its owner's P-1 messages, l + (P-1) s / w. What is
computed (the folds; for dense transitions, doubling's products of K x K matrices) and what is hidden behind other work
is not in the model. Of strategies that take equally long the first in this list is chosen.
"""

from __future__ import annotations

import itertools
import statistics
import time
import weakref
from typing import Any, NamedTuple

import torch

from ..comm import collectives, groups, messages
from ..comm.groups import Group
from ..comm.link import Link
from ..comm.pending import Header
from ..shard import SequenceParallel, spans_of

BLOCKS = 4  # of a state in the pipeline

SMALL, LARGE = 8, 1 << 20  # bytes of the messages by which a link is measured
REPEATS = 5


class Choice(NamedTuple):
    """The exchange of a linear layer; for "auto" also the link, and what each strategy takes, forward and backward."""

    strategy: str
    link: Link | None = None
    seconds: dict[str, float] | None = None


def choose(sp: SequenceParallel, *, state_bytes: int, transition_bytes: int = 0, final: bool = False) -> Choice:
    """The exchange of a linear layer whose spans have states [B,H,K,V] of so many bytes, and transitions that are sent
    (of scalar, vector and dense decays) of so many; `final`: a final state is asked for. The same on all ranks.

    With linear="auto" and no `link`, the first call measures it and all ranks must make it together, for a run at its
    start; later calls communicate nothing.
    """
    if sp.linear != "auto":
        return Choice(sp.linear)
    if sp.size == 1:
        return Choice("all_gather")
    link = sp.link or measured(sp.group)
    spans = len(spans_of(0, sp.size, sp.layout))
    took = seconds(link, sp.size, spans, state_bytes, transition_bytes, final)
    return Choice(fastest(took), link, took)


def fastest(seconds: dict[str, float]) -> str:
    """The first of the strategies that take the least."""
    return min(seconds, key=lambda name: seconds[name])


def seconds(link: Link, P: int, m: int, s: int, t: int, final: bool) -> dict[str, float]:
    """What each strategy takes, forward and backward, by the formulas above."""
    hops, rounds = m * P - m, (m * P - 1).bit_length()
    ends = 2 * link.seconds(1, (P - 1) * s) if final else 0.0
    turns = hops + m * (BLOCKS - 1)
    return {
        "all_gather": link.seconds(2 * (P - 1), (P - 1) * (m * (s + t) + (m + final) * s)),
        "ring": 2 * link.seconds(hops, hops * s) + ends,
        "pipeline": 2 * link.seconds(turns, turns * s / BLOCKS) + ends,
        "doubling": 2 * link.seconds(rounds, m * (rounds * s + (rounds - 1) * t)) + ends,
    }


_links: weakref.WeakKeyDictionary[Any, Link] = weakref.WeakKeyDictionary()


def measured(group: Group) -> Link:
    """The network between the ranks of a group, the same on all of them: the longest latency and the least bandwidth
    that a rank sees when each sends to the next one. Measured once."""
    if group not in _links:
        shift = _Shift(group)
        latency = shift.seconds(SMALL)
        large = shift.seconds(LARGE)
        bandwidth = LARGE / max(large - latency, large / 2)  # a busy moment may make the small message the slower one
        here = torch.tensor([latency, bandwidth], dtype=torch.float64, device=groups.device(group))
        latencies, bandwidths = collectives.all_gather(here, group, tag="link").T.tolist()
        _links[group] = Link(latency=max(latencies), bandwidth=min(bandwidths))
    return _links[group]


class _Shift:
    """Every rank sends a message to the next one of the group and receives one from the one before."""

    def __init__(self, group: Group) -> None:
        self.group, self.device = group, groups.device(group)
        self.numbers = itertools.count()
        self.header = messages.open_exchange(Header(tag="link"), "shift", torch.empty(0), group)

    def seconds(self, size: int) -> float:
        """Of a message of so many bytes: the median of a few, after one that does not count."""
        x = torch.zeros(size, dtype=torch.uint8, device=self.device)
        return statistics.median([self._once(x) for _ in range(REPEATS + 1)][1:])

    def _once(self, x: torch.Tensor) -> float:
        here, ranks, number = groups.rank(self.group), groups.size(self.group), next(self.numbers)
        begin = time.perf_counter()
        receive = messages.start_receive(x, (here - 1) % ranks, number, self.group, self.header)
        send = messages.start_send(x, (here + 1) % ranks, number, self.group, self.header)
        receive.wait()[-1].item()  # on CUDA a wait only orders the stream
        send.wait()
        return time.perf_counter() - begin
