"""Operators on several ranks, taking turns: `measured` starts the processes, each of which runs this file.

One thread per rank. Every sample begins at a barrier; each rank tells the seconds of its forward and of its backward
pass, what it received, and how long it stood still for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from analysis.bench.measure import ROOT, Row
from analysis.bench.ranks import network
from hybrid_sp.comm import collectives, groups, link
from hybrid_sp.comm.ledger import Ledger
from hybrid_sp.comm.link import Link
from recipes.allocator import keep_freed_memory

TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One operator under one strategy. `options` are those of hsp.SequenceParallel."""

    name: str
    layer: str  # linear, delta or softmax
    length: int  # tokens of the whole sequence
    options: dict[str, Any] = field(default_factory=dict)
    heads: int = 4
    kv_heads: int | None = None  # softmax; None: heads
    width: int = 64  # of keys and values
    decay: str = "none"  # none, scalar or vector
    repetitions: int | None = None  # None: the job's, after one that warms up and does not count


@dataclass(frozen=True, kw_only=True)
class Job:
    contenders: tuple[Contender, ...]
    repetitions: int
    link: tuple[float, float] | None = None  # pretended: seconds of latency, bytes per second


@dataclass(frozen=True, kw_only=True)
class Way:
    """One direction of one call on one rank.

    waited              seconds in which it stood still for others
    launched, arrived   when it asked for the first of what it received, and had the last, by the clock of the machine;
                        None if it receives nothing, as the first rank of a ring
    """

    seconds: float
    waited: float
    launched: float | None
    arrived: float | None
    bytes: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One forward and backward pass of a contender, by rank."""

    forward: tuple[Way, ...]
    backward: tuple[Way, ...]

    @property
    def seconds(self) -> float:
        """Of the slowest rank."""
        return max(f.seconds + b.seconds for f, b in zip(self.forward, self.backward, strict=True))

    def longest(self, direction: str, what: str) -> float:
        """Of the rank that has most of it."""
        return max(getattr(way, what) for way in getattr(self, direction))

    def exchange(self, direction: str) -> float:
        """Seconds from when the last rank is there until every rank has all; that one rank computes longer than another
        is no part of it."""
        ways = [way for way in getattr(self, direction) if way.launched is not None]
        return max(way.arrived for way in ways) - max(way.launched for way in ways)


Samples = dict[str, list[Sample]]


def median(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    return statistics.median(of(sample) for sample in samples)


def rows_of(contenders: Sequence[Contender], samples: Samples) -> list[Row]:
    """Seconds of every sample, for the table's results."""
    return [
        Row(contender=one.name, length=one.length, values=[sample.seconds for sample in samples[one.name]])
        for one in contenders
    ]


@dataclass(frozen=True, kw_only=True)
class Net:
    """What the ranks are joined by: `words` for the report, and the prefix and environment of each rank's command."""

    words: str
    ranks: list[tuple[list[str], dict[str, str]]]
    link: tuple[float, float] | None = None


@contextlib.contextmanager
def loopback(ranks: int) -> Iterator[Net]:
    """This machine's own memory."""
    address = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    yield Net(words="one machine, loopback", ranks=[([], address)] * ranks)


@contextlib.contextmanager
def slow(ranks: int, megabits: float) -> Iterator[Net]:
    """Each rank a host of its own behind a link of that rate; pretended by waiting where namespaces cannot be had."""
    reason = network.impossible()
    if reason is None:
        with network.hosts(ranks, megabits) as hosts:
            words = f"{ranks} network namespaces, tc tbf {megabits:g} Mbit/s each"
            yield Net(words=words, ranks=[(host.prefix, dict(host.environment)) for host in hosts])
        return
    with loopback(ranks) as net:
        link = (1e-4, megabits * 1e6 / 8)
        yield Net(words=f"a pretended link of {megabits:g} Mbit/s and 0.1 ms ({reason})", ranks=net.ranks, link=link)


def measured(contenders: Sequence[Contender], repetitions: int, net: Net) -> Samples:
    """Samples of every contender, taken in turns. Raises RuntimeError with what the ranks said if one fails."""
    job = Job(contenders=tuple(contenders), repetitions=repetitions, link=net.link)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(asdict(job)))
        run_everywhere([sys.executable, "-m", __name__, str(path)], net)
        values = json.loads((Path(folder) / "samples.json").read_text())
    return {
        name: [Sample(**{way: tuple(Way(**one) for one in ranks) for way, ranks in s.items()}) for s in samples]
        for name, samples in values.items()
    }


def run_everywhere(command: Sequence[str], net: Net) -> None:
    """The command on every rank of the net, each told its place as torchrun would. Raises RuntimeError if one fails."""
    common = {"WORLD_SIZE": str(len(net.ranks)), "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, (prefix, environment) in enumerate(net.ranks):
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            settings = os.environ | environment | common | {"RANK": str(rank), "LOCAL_RANK": "0"}
            process = subprocess.Popen([*prefix, *command], env=settings, cwd=ROOT, stdout=said, stderr=said)
            stack.callback(process.kill)
            processes.append((process, said))
        codes = [process.wait() for process, _ in processes]
        if any(codes):
            texts = []
            for rank, (_, said) in enumerate(processes):
                said.seek(0)
                texts.append(f"rank {rank}, exit code {codes[rank]}:\n{said.read()[-2000:]}")
            raise RuntimeError("a measurement failed\n" + "\n".join(texts))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- the side of the ranks ---------------------------------------------------------------------------------------------


def main(path: Path) -> None:
    values = json.loads(path.read_text())
    job = Job(**values | {"contenders": tuple(Contender(**one) for one in values["contenders"])})
    keep_freed_memory()
    torch.set_num_threads(1)
    group = hsp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout=TIMEOUT)["sp"].get_group()
    samples: dict[str, list[tuple[Way, Way]]] = {one.name: [] for one in job.contenders}
    calls = {one.name: _prepared(one, group) for one in job.contenders}
    network_ = (
        contextlib.nullcontext() if job.link is None else link.slowed(Link(latency=job.link[0], bandwidth=job.link[1]))
    )
    with network_:
        for repetition in range(-1, job.repetitions):
            for one in job.contenders:
                first, end = (-1, job.repetitions) if one.repetitions is None else (0, one.repetitions)
                if first <= repetition < end:
                    sample = calls[one.name]()
                    if repetition >= 0:
                        samples[one.name].append(sample)
    every = collectives.gather_objects(samples, group)
    if groups.rank(group) == 0:
        result = {
            one.name: [
                {way: [asdict(ranks[one.name][i][place]) for ranks in every] for place, way in enumerate(WAYS)}
                for i in range(len(samples[one.name]))
            ]
            for one in job.contenders
        }
        (path.parent / "samples.json").write_text(json.dumps(result))
    collectives.leave(group)


WAYS = ("forward", "backward")


def _prepared(one: Contender, group: Any) -> Callable[[], tuple[Way, Way]]:
    """A call that takes a sample; all that it needs is made here."""
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
    operator: Any = {"linear": hsp.linear_attention, "delta": hsp.delta_rule, "softmax": hsp.softmax_attention}[
        one.layer
    ]
    d_o = normal(one.heads, one.width)

    def sample() -> tuple[Way, Way]:
        shard = sp.shard(one.length)
        x = [leaf.detach().requires_grad_() for leaf in leaves]
        named = {name: value.detach().requires_grad_() for name, value in extra.items()}
        collectives.barrier(group)
        with hsp.ledger() as there:
            begin = time.perf_counter()
            o = operator(*x, **named, shard=shard)
            middle = time.perf_counter()
        with hsp.ledger() as back:
            o.backward(d_o)
            end = time.perf_counter()
        return _way(there, middle - begin), _way(back, end - middle)

    return sample


def _way(book: Ledger, seconds: float) -> Way:
    return Way(
        seconds=seconds,
        waited=book.blocked_seconds,
        launched=min((row.launched for row in book.rows), default=None),
        arrived=max((row.arrived for row in book.rows if row.arrived is not None), default=None),
        bytes=book.bytes,
        calls=book.calls,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
