"""The fetch: a rank reads a few ranges of the sequence from the ranks that hold them.

A span of a causal operator with a short memory reads a few tokens before its first one, its halo. Every rank computes
from the shard which tokens each rank reads and who holds them. One all-to-all therefore carries the rows forward, and
its mirror image carries their gradients back to the owners. The bytes sent do not depend on the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm import collectives
from ..comm.pending import Header, Pending
from ..shard import Shard, held

Range = tuple[int, int]  # tokens [first, end) of the whole sequence


def before(shard: Shard, rank: int, width: int) -> list[Range]:
    """Return the `width` tokens before each span of a rank, as far as they share a document with its first token."""
    return [(max(start - width, shard.document_start(start)), start) for start, _ in shard.spans_at(rank)]


def last(shard: Shard, width: int) -> Range:
    """Return the last `width` tokens of the sequence, cut at the begin of its last document."""
    return max(shard.length - width, shard.document_start(shard.length - 1)), shard.length


def rows_of_others(shard: Shard, rank: int, ranges: Sequence[Range]) -> int:
    """Count the tokens of these ranges that other ranks hold."""
    own = shard.spans_at(rank)
    return sum(b - a - sum(max(0, min(b, end) - max(a, start)) for start, end in own) for a, b in ranges)


class FetchPlan:
    """The plan of a fetch, equal on all ranks: the tokens that each rank sends to each. Rank r reads wanted[r].

    ranges  the ranges that this rank reads; the rows that it receives lie in this order
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
        self._order = sorted(range(len(self._wanted)), key=lambda i: routes[me][i].rank)  # of arrival, by rank
        self._received = [sum(p.tokens for p in routes[me] if p.rank == rank) for rank in range(shard.sp.size)]
        self._group = shard.sp.group

    def pick(self, x: Tensor) -> Tensor:
        """Return the rows of x [B,T,...] that this rank sends, as [rows,B,...]."""
        rows = x.detach().transpose(0, 1)
        return torch.cat([rows[:0], *(rows[p.first : p.first + p.tokens] for p in self._picked)])

    def add(self, x: Tensor, rows: Tensor) -> None:
        """Add rows to the places of x that `pick` reads, in place."""
        for piece, part in zip(self._picked, rows.split([p.tokens for p in self._picked]), strict=True):
            x[:, piece.first : piece.first + piece.tokens] += part.transpose(0, 1)

    def fetch(self, header: Header, picked: Tensor) -> Pending:
        """Send picked rows; the result holds the rows of this rank's ranges."""
        if self.empty:
            return Pending(lambda: picked)
        place = {i: k for k, i in enumerate(self._order)}

        def arrange(received: Tensor) -> Tensor:
            arrived = received.split([self._wanted[i] for i in self._order])
            return torch.cat([received[:0], *(arrived[place[i]] for i in range(len(arrived)))])

        return collectives.start_all_to_all(picked, self._sent, self._received, self._group, header).then(arrange)

    def give_back(self, header: Header, rows: Tensor) -> Pending:
        """Send rows back to the owners of their tokens, for `add`: the adjoint of `fetch`."""
        if self.empty:
            return Pending(lambda: rows)
        wanted = rows.split(self._wanted)
        sent = torch.cat([rows[:0], *(wanted[i] for i in self._order)])
        return collectives.start_all_to_all(sent, self._received, self._sent, self._group, header)
