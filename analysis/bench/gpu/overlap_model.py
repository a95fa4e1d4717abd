"""The model of overlap: it takes one device's times and computes how much of a linear layer's exchange work would hide.

The timeline records the phases of a layer of Linear-Llama3-1B between CUDA events: states | intra | inter forward,
inter | intra | states backward. In both directions the exchange runs during intra. Its time is modelled, not measured:
a rank receives (P-1) * spans * H * (K*V + transition) numbers of fp32, backward without the transition, at the rate of
a link. The model has no latency, no folding, and no cost for the device.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

import hybrid_sp as hsp
from analysis.bench.device import linear_backend
from analysis.bench.sizes import KernelSizes
from analysis.bench.stopwatch import Budget, Stopwatch
from analysis.tables import Table
from hybrid_sp.exchange import EXCHANGES, Sizes
from hybrid_sp.exchange.strategy import GRADIENT
from hybrid_sp.shard import LAYOUTS
from layers.cost import Summary

DECAYS = ("none", "scalar")
DIRECTIONS = ("forward", "backward")
PHASES = ("states", "intra", "inter")
RANKS = (8, 64)
LINKS = {"NVLink, 450 GB/s": 450e9, "400 Gb/s": 50e9}  # bytes a second in one direction


@dataclass(kw_only=True)
class Phase:
    """The times of one phase of a layer in one direction, in seconds."""

    decay: str
    length: int
    phase: str
    direction: str
    values: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"phase {self.phase}, {self.direction}, decay {self.decay}"

    @property
    def seconds(self) -> float:
        return statistics.median(self.values)


def measure_phases(
    shape: KernelSizes, watch: Stopwatch, dtype: torch.dtype, budget: Budget, notes: list[str]
) -> list[Phase]:
    """Measure all phases of one layer at every decay and length, with an initial state like any rank but the first."""
    done: list[Phase] = []
    for decay in DECAYS:
        for length in shape.model_lengths:
            if budget.over:
                notes.append(f"not measured, out of time: phases, decay {decay}, T={length}")
                continue
            done += _measure(decay, length, shape, watch, dtype, budget)
    return done


def _measure(
    decay: str, length: int, shape: KernelSizes, watch: Stopwatch, dtype: torch.dtype, budget: Budget
) -> list[Phase]:
    phases = [
        Phase(decay=decay, length=length, phase=phase, direction=direction)
        for direction in DIRECTIONS
        for phase in PHASES
    ]
    heads, device = shape.model["heads"], watch.device
    width = shape.model["dim"] // heads
    q, k, v, do = (torch.randn(1, length, heads, width, dtype=dtype, device=device) for _ in range(4))
    initial = torch.randn(1, heads, width, width, device=device)
    leaves = [leaf.requires_grad_() for leaf in (q, k, v, initial)]
    log_decay = None
    if decay == "scalar":
        log_decay = (-torch.rand(1, length, heads, device=device) / 16).requires_grad_()
        leaves.append(log_decay)

    def run() -> None:
        o, _ = hsp.linear_attention(
            *leaves[:3], log_decay=log_decay, initial_state=initial, return_final_state=True, backend=linear_backend()
        )
        torch.autograd.grad(o, leaves, do)

    launching = watch.time(run).host
    for repetition in range(shape.repetitions + 1):
        if repetition > 1 and budget.over:
            break
        watch.pause(2 * launching)
        with hsp.ledger() as book:
            run()
        times: dict[tuple[str, str], float] = {}
        for piece in book.phases:
            at = piece.name, piece.direction
            times[at] = times.get(at, 0.0) + piece.end - piece.begin
        for phase in phases:
            if repetition:  # the first warms up
                phase.values.append(times[phase.phase, phase.direction])
    return phases


def phase_tables(done: list[Phase], shape: KernelSizes) -> Iterator[str | Table]:
    """Yield the table of the phases, and the table of the time that an exchange would still make a rank wait."""
    if done:
        yield "Phases of one linear layer of that model, ms:"
        yield _phases(done)
        yield "Its exchange of states, modelled, and what intra would leave of it to wait for, ms, forward + backward:"
        yield _exposed(done, shape)


def _phases(done: list[Phase]) -> Table:
    names = [f"{phase}, {direction}" for direction in DIRECTIONS for phase in PHASES]
    rows = tuple(
        (done[i].decay, str(done[i].length), *(f"{phase.seconds * 1e3:.3f}" for phase in done[i : i + len(names)]))
        for i in range(0, len(done), len(names))
    )
    header = ("decay", "tokens per rank", *names)
    return Table(header=header, rows=rows, numbers=frozenset(header[1:]))


def received(summary: Summary, ranks: int, layout: str) -> tuple[int, int]:
    """Return the bytes that a rank receives each way in the all-gather of states, for one row of the batch."""
    state, transition = (summary.heads * numbers * GRADIENT for numbers in summary.numbers)
    return EXCHANGES["all_gather"].received(Sizes(ranks, layout, state, transition), 0)


def _exposed(done: list[Phase], shape: KernelSizes) -> Table:
    heads = shape.model["heads"]
    width = shape.model["dim"] // heads
    intra = {(p.decay, p.length, p.direction): p.seconds for p in done if p.phase == "intra"}
    rows = []
    for decay, length in dict.fromkeys((decay, length) for decay, length, _ in intra):
        summary = Summary(heads=heads, key=width, value=width, transition=decay)
        hidden = [intra[decay, length, direction] for direction in DIRECTIONS]
        for ranks in RANKS:
            for spans, layout in enumerate(LAYOUTS, 1):
                cells = [decay, str(length), str(ranks), str(spans)]
                for rate in LINKS.values():
                    exchange = [bytes_ / rate for bytes_ in received(summary, ranks, layout)]
                    exposed = [max(0.0, there - work) for there, work in zip(exchange, hidden, strict=True)]
                    cells += [" + ".join(f"{took * 1e3:.3f}" for took in times) for times in (exchange, exposed)]
                rows.append(tuple(cells))
    links = [name for link in LINKS for name in (f"exchange, {link}", "exposed")]
    header = ("decay", "tokens per rank", "ranks", "spans a rank", *links)
    return Table(header=header, rows=tuple(rows), numbers=frozenset(header[1:]))
