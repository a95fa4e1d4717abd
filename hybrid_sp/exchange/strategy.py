"""The facts that every strategy gives in its own file: its label in tables, its bytes, its seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..comm.link import Link
from ..overlap import Exchange
from ..shard import Shard, spans_of


class Request(NamedTuple):
    """The demands of one operator call.

    known_decays       log decays [n, ...] of all spans, where every rank can compute them: they are not sent
    has_initial_state  the caller gives an initial state
    needs_final_state  the caller asks for the state that leaves the sequence
    """

    known_decays: Tensor | None = None
    has_initial_state: bool = False
    needs_final_state: bool = False


class Sizes(NamedTuple):
    """The sizes of one exchange.

    ranks, layout      the ranks P; each holds m spans: 1 contiguous, 2 zigzag
    state, transition  bytes of a span's state, and of the transition sent with it (0 where all ranks know it)
    final              the caller asks for a final state, and it has a gradient
    """

    ranks: int
    layout: str
    state: int
    transition: int = 0
    final: bool = False

    @property
    def spans(self) -> int:
        """Count the spans of one rank (m)."""
        return len(self.own(0))

    @property
    def hops(self) -> int:
        """Count the steps from a span to the next one that another rank holds, over the whole sequence."""
        return self.spans * (self.ranks - 1)

    def own(self, rank: int) -> tuple[int, ...]:
        """Return the spans of a rank."""
        return spans_of(rank, self.ranks, self.layout)

    def owner(self, span: int) -> int:
        """Return the rank that owns a span of the sequence."""
        return next(rank for rank in range(self.ranks) if span in self.own(rank))

    @property
    def last_owner(self) -> int:
        """Return the rank that owns the last span."""
        return self.owner(self.ranks * self.spans - 1)


class Strategy(NamedTuple):
    """The description of one way to exchange states.

    label     its name in tables
    make      makes the exchange of one call
    received  bytes that a rank receives, forward and backward
    seconds   time until the last rank has the states that enter its spans, forward plus backward, on a link.
              Computation is not included, nor is the time that other work hides subtracted
    baseline  only for comparison: `auto` does not choose it
    """

    label: str
    make: Callable[[Shard, Request], Exchange]
    received: Callable[[Sizes, int], tuple[int, int]]
    seconds: Callable[[Link, Sizes], float]
    baseline: bool = False


class TokenSizes(NamedTuple):
    """The sizes of an exchange of tokens.

    ranks, layout   as in `Sizes`
    batch, length   sequences, and tokens in each (L)
    queries, keys, values, outputs   numbers of one token, over all heads
    element         bytes of one of these numbers; gradients and gates travel in fp32
    gates           numbers of a token's gates, over all heads
    decays          numbers of a token's log decays, over all heads; 0 where every rank knows them
    heads, groups   query (or value) heads and key heads, which baselines cut
    keep_kv         keys and values are kept for backward
    """

    ranks: int
    layout: str
    batch: int
    length: int
    queries: int
    keys: int
    values: int
    outputs: int
    element: int
    gates: int = 0
    decays: int = 0
    heads: int = 1
    groups: int = 1
    keep_kv: bool = True

    @property
    def rows(self) -> int:
        """Count the tokens of the longest rank, over the batch: B ceil(L / P). Raises ValueError if a rank would have
        none."""
        if not 1 <= self.ranks <= self.length:
            raise ValueError(
                f"{self.ranks} ranks for a sequence of {self.length} tokens; take 1 to {self.length} ranks"
            )
        return self.batch * -(-self.length // self.ranks)


GRADIENT = 4  # bytes of one number of a gradient, gate or decay: fp32


class TokenStrategy(NamedTuple):
    """The description of one way to exchange tokens: its label in tables, and the bytes that a rank receives each
    way."""

    label: str
    received: Callable[[TokenSizes], tuple[int, int]]
