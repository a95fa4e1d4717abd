"""The samples of operators on several ranks: `take_samples` starts the ranks, and each of them runs this file.

Contenders take turns, one thread per rank, and every sample begins at a barrier. Each rank records the
seconds of its forward and of its backward pass, the bytes received, and the time spent waiting.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from analysis.bench.ranks.launch import answer, ask
from analysis.bench.ranks.network import Network
from analysis.bench.result import Row
from hybrid_sp.comm import collectives, groups
from hybrid_sp.comm.groups import Group
from hybrid_sp.comm.ledger import Ledger
from hybrid_sp.comm.link import Link, slowed
from recipes.allocator import keep_freed_memory

DIRECTIONS = ("forward", "backward")
OPERATORS: dict[str, Any] = {
    "linear": hsp.linear_attention,
    "delta": hsp.delta_rule,
    "softmax": hsp.softmax_attention,
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """The operator of a row under one strategy; `options` go to hsp.SequenceParallel."""

    name: str
    layer: str  # a key of OPERATORS
    length: int  # tokens of the whole sequence
    options: dict[str, Any] = field(default_factory=dict)
    heads: int = 4
    kv_heads: int | None = None  # for softmax; None means heads
    width: int = 64  # channels of keys and values
    decay: str = "none"  # none, scalar or vector
    repetitions: int | None = None  # fewer than for others, and without a warm-up


class PassTiming(NamedTuple):
    """The timing of one direction of one call, on one rank.

    seconds             the time of the pass
    waited              the part of the pass in which the rank stood still for others
    launched, arrived   the times at which it asked for its first message and had its last, by the machine's clock;
                        None if it receives nothing, like the first rank of a ring
    bytes, calls        the bytes received, and the collectives and messages
    """

    seconds: float
    waited: float
    launched: float | None
    arrived: float | None
    bytes: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The forward and the backward pass of one call of a contender, by rank."""

    forward: tuple[PassTiming, ...]
    backward: tuple[PassTiming, ...]

    @property
    def seconds(self) -> float:
        """The seconds of the slowest rank."""
        return max(f.seconds + b.seconds for f, b in zip(self.forward, self.backward, strict=True))

    @property
    def exchange_seconds(self) -> float:
        """The seconds from the last rank's entry into the exchange until every rank has received everything.

        They count both directions, and leave out the time lost to a rank that computes longer than another.
        """
        return sum(
            max(one.arrived for one in passes if one.arrived is not None)
            - max(one.launched for one in passes if one.launched is not None)
            for passes in (self.forward, self.backward)
        )

    def most(self, direction: str, what: str) -> float:
        """Return the greatest value of a field of PassTiming over the ranks."""
        return max(getattr(one, what) for one in getattr(self, direction))

    def total(self, what: str) -> float:
        """Return the sum of `most` over both directions."""
        return sum(self.most(direction, what) for direction in DIRECTIONS)


Samples = dict[str, list[Sample]]  # by contender


def median(samples: Sequence[Sample], of: Callable[[Sample], float] = lambda sample: sample.seconds) -> float:
    """Return the median of a number of each sample, by default its seconds."""
    return statistics.median(of(sample) for sample in samples)


def rows_of(contenders: Sequence[Contender], samples: Samples) -> list[Row]:
    """Return the seconds of every sample, a row per contender."""
    return [
        Row(contender=one.name, length=one.length, values=[sample.seconds for sample in samples[one.name]])
        for one in contenders
    ]


def take_samples(contenders: Sequence[Contender], repetitions: int, network: Network) -> Samples:
    """Return samples of every contender; raises RuntimeError with the output of all ranks if one of them fails."""
    link = asdict(network.link) if network.link else None
    question = {"contenders": [*map(asdict, contenders)], "repetitions": repetitions, "link": link}
    found: Samples = {}
    for name, samples in ask(__name__, question, network).items():
        passes = [[[PassTiming(*one) for one in rank] for rank in ranks] for ranks in samples]
        pairs = [tuple(zip(*ranks, strict=True)) for ranks in passes]
        found[name] = [Sample(forward=forward, backward=backward) for forward, backward in pairs]
    return found


def _take_samples_on_rank(question: dict[str, Any], group: Group) -> dict[str, Any]:
    """Return, for each contender, a list over samples, ranks and directions."""
    keep_freed_memory()
    contenders = [Contender(**one) for one in question["contenders"]]
    calls = {one.name: _prepare(one, group) for one in contenders}
    samples: dict[str, list[tuple[PassTiming, PassTiming]]] = {one.name: [] for one in contenders}
    with slowed(Link(**question["link"])) if question["link"] else contextlib.nullcontext():
        for repetition in range(-1, question["repetitions"]):
            for one in contenders:
                first, end = (-1, question["repetitions"]) if one.repetitions is None else (0, one.repetitions)
                if first <= repetition < end:
                    sample = calls[one.name]()
                    if repetition >= 0:
                        samples[one.name].append(sample)
    every = collectives.gather_objects(samples, group)
    return {name: list(zip(*(rank[name] for rank in every), strict=True)) for name in samples}


def _prepare(one: Contender, group: Group) -> Callable[[], tuple[PassTiming, PassTiming]]:
    """Draw the tensors of a contender and return a function that takes a sample."""
    sp = hsp.SequenceParallel(group, **one.options)
    make = torch.Generator().manual_seed(groups.rank(group))
    tokens = sp.shard(one.length).tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, generator=make)

    kv_heads = one.heads if one.kv_heads is None or one.layer != "softmax" else one.kv_heads
    q, k, v = normal(one.heads, one.width), normal(kv_heads, one.width), normal(kv_heads, one.width)
    leaves = [q, F.normalize(k, dim=-1) if one.layer == "delta" else k, v]
    extra: dict[str, Tensor] = {}
    if one.decay != "none":
        extra["log_decay"] = F.logsigmoid(normal(one.heads, *([one.width] if one.decay == "vector" else []))) / 16
    if one.layer == "delta":
        extra["beta"] = torch.rand(1, tokens, one.heads, generator=make)
    d_o = normal(one.heads, one.width)

    def sample() -> tuple[PassTiming, PassTiming]:
        shard = sp.shard(one.length)
        qkv = [leaf.detach().requires_grad_() for leaf in leaves]
        others = {name: value.detach().requires_grad_() for name, value in extra.items()}
        collectives.barrier(group)
        with hsp.ledger() as there:
            begin = time.perf_counter()
            o = OPERATORS[one.layer](*qkv, **others, shard=shard)
            middle = time.perf_counter()
        with hsp.ledger() as back:
            o.backward(d_o)
            end = time.perf_counter()
        return _timing(there, middle - begin), _timing(back, end - middle)

    return sample


def _timing(book: Ledger, seconds: float) -> PassTiming:
    return PassTiming(
        seconds=seconds,
        waited=book.blocked_seconds,
        launched=min((row.launched for row in book.rows), default=None),
        arrived=max((row.arrived for row in book.rows if row.arrived is not None), default=None),
        bytes=book.bytes,
        calls=book.calls,
    )


if __name__ == "__main__":
    answer(_take_samples_on_rank)
