"""How ranks learn tokens that other ranks hold: a few ranges of the sequence, each from its owners.

A span of a causal operator with a short memory reads a few tokens before its first one, its halo. Both ends compute
from the shard what every rank reads and who holds it, so one all-to-all carries the rows forward, and its mirror image
carries their gradients back to the owners. What is sent does not depend on the length of the sequence.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..comm import collectives
from ..comm.pending import Header, Pending
from ..shard import Shard

Range = tuple[int, int]  # tokens [first, end) of the whole sequence


def before(shard: Shard, rank: int, width: int) -> list[Range]:
    """For each span of a rank the `width` tokens before it, as far as they lie in the document of its first token."""
    return [(max(start - width, shard.document_start(start)), start) for start, _ in shard.spans_at(rank)]


def last(shard: Shard, width: int) -> Range:
    """The last `width` tokens of the sequence, as far as they lie in its last document."""
    return max(shard.length - width, shard.document_start(shard.length - 1)), shard.length


class Held(NamedTuple):
    """Consecutive tokens of one rank; `first` counts among that rank's tokens."""

    rank: int
    first: int
    tokens: int


def held(shard: Shard, first: int, end: int) -> Iterator[Held]:
    """Who holds the tokens of a range, in sequence order."""
    span = bisect.bisect_right(shard.bounds, first) - 1
    while first < end:
        rank, slot = shard.owners[span]
        spans = shard.spans_at(rank)
        stop = min(end, shard.bounds[span + 1])
        place = sum(b - a for a, b in spans[:slot]) + first - spans[slot][0]
        yield Held(rank, place, stop - first)
        first, span = stop, span + 1


def rows_of_others(shard: Shard, rank: int, ranges: Sequence[Range]) -> int:
    """How many tokens of these ranges other ranks hold."""
    own = shard.spans_at(rank)
    return sum(b - a - sum(max(0, min(b, end) - max(a, start)) for start, end in own) for a, b in ranges)


class FetchPlan:
    """Who sends which tokens to whom, where rank r reads the ranges wanted[r]; the same on all ranks.

    ranges  what this rank reads; the rows that it receives lie in this order
    empty   nobody reads anything, so nothing is sent
    """

    def __init__(self, shard: Shard, wanted: Sequence[Sequence[Range]]) -> None:
        me = shard.sp.rank
        routes = [[piece for a, b in ranges for piece in held(shard, a, b)] for ranges in wanted]
        self.ranges = list(wanted[me])
        self.empty = not any(routes)
        to = [[piece for piece in route if piece.rank == me] for route in routes]
        self._picked = [piece for pieces in to for piece in pieces]
        self._sent = [sum(piece.tokens for piece in pieces) for pieces in to]
        self._wanted = [piece.tokens for piece in routes[me]]
        self._order = sorted(range(len(self._wanted)), key=lambda i: routes[me][i].rank)  # in which they arrive
        self._received = [sum(p.tokens for p in routes[me] if p.rank == rank) for rank in range(shard.sp.size)]
        self._group = shard.sp.group

    def pick(self, x: Tensor) -> Tensor:
        """The rows that this rank sends, of x [B,T,...], as [rows,B,...]."""
        rows = x.detach().transpose(0, 1)
        return torch.cat([rows[:0], *(rows[p.first : p.first + p.tokens] for p in self._picked)])

    def add(self, x: Tensor, rows: Tensor) -> None:
        """Add what `pick` would take to x, in place."""
        for piece, part in zip(self._picked, rows.split([p.tokens for p in self._picked]), strict=True):
            x[:, piece.first : piece.first + piece.tokens] += part.transpose(0, 1)

    def fetch(self, header: Header, picked: Tensor) -> Pending:
        """Send picked rows; the result are the rows of this rank's ranges."""
        if self.empty:
            return Pending(lambda: picked)
        place = {i: k for k, i in enumerate(self._order)}

        def arrange(received: Tensor) -> Tensor:
            arrived = received.split([self._wanted[i] for i in self._order])
            return torch.cat([received[:0], *(arrived[place[i]] for i in range(len(arrived)))])

        return collectives.start_all_to_all(picked, self._sent, self._received, self._group, header).then(arrange)

    def give_back(self, header: Header, rows: Tensor) -> Pending:
        """The adjoint of `fetch`: rows go to the owners of their tokens, where `add` takes the result."""
        if self.empty:
            return Pending(lambda: rows)
        wanted = rows.split(self._wanted)
        sent = torch.cat([rows[:0], *(wanted[i] for i in self._order)])
        return collectives.start_all_to_all(sent, self._received, self._sent, self._group, header)
