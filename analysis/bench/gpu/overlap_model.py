"""How much of the exchange of a linear layer the work within chunks would hide, from times measured on one device.

The phases of a layer of Linear-Llama3-1B are those that the timeline records, between CUDA events: states | intra |
inter forward, inter | intra | states backward. The exchange runs beside intra, both ways. What it would take is
modelled, not measured: the bytes that a rank receives, (P-1) * spans * H * (K*V + transition) numbers of fp32 (backward
without the transition), over the rate of a link; no latency, no folding, and nothing that it takes from the device.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

import hybrid_sp as hsp
from analysis.bench.device import Budget, Stopwatch, linear_backend
from analysis.bench.measure import KernelSizes
from layers.cost import Summary

DECAYS = ("none", "scalar")
WAYS = ("forward", "backward")
PHASES = ("states", "intra", "inter")
RANKS = (8, 64)
LINKS = {"NVLink, 450 GB/s": 450e9, "400 Gb/s": 50e9}  # bytes a second in one direction


@dataclass(kw_only=True)
class Phase:
    """The times of one phase of a layer in one direction, in seconds."""

    decay: str
    length: int
    phase: str
    way: str
    values: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"phase {self.phase}, {self.way}, decay {self.decay}"

    @property
    def seconds(self) -> float:
        return statistics.median(self.values)


def phases(shape: KernelSizes, watch: Stopwatch, dtype: torch.dtype, budget: Budget, notes: list[str]) -> list[Phase]:
    """All phases of one layer, at every decay and length; states enter, as on a rank that is not the first."""
    done: list[Phase] = []
    for decay in DECAYS:
        for length in shape.model_lengths:
            if budget.over:
                notes.append(f"not measured, out of time: phases, decay {decay}, T={length}")
                continue
            here = {
                (phase, way): Phase(decay=decay, length=length, phase=phase, way=way)
                for way in WAYS
                for phase in PHASES
            }
            _measure(here, decay, length, shape, watch, dtype, budget)
            done += here.values()
    return done


def _measure(
    here: dict[tuple[str, str], Phase],
    decay: str,
    length: int,
    shape: KernelSizes,
    watch: Stopwatch,
    dtype: torch.dtype,
    budget: Budget,
) -> None:
    heads, device = shape.model["heads"], watch.device
    width = shape.model["dim"] // heads
    q, k, v, do = (torch.randn(1, length, heads, width, dtype=dtype, device=device) for _ in range(4))
    initial = torch.randn(1, heads, width, width, device=device)
    leaves = [x.requires_grad_() for x in (q, k, v, initial)]
    if decay == "scalar":
        leaves.append((-torch.rand(1, length, heads, device=device) / 16).requires_grad_())
    log_decay = leaves[4] if decay == "scalar" else None

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
        for at, phase in here.items():
            if repetition:  # the first warms up
                phase.values.append(times[at])


def lines(done: list[Phase], shape: KernelSizes) -> list[str]:
    """Two tables: the phases, and what the exchange would leave to wait for."""
    return [*_phase_lines(done), *_hidden_lines(done, shape)] if done else []


def _phase_lines(done: list[Phase]) -> Iterator[str]:
    yield "\nPhases of one linear layer of that model, ms:\n"
    names = [f"{phase}, {way}" for way in WAYS for phase in PHASES]
    yield f"| decay | tokens per rank | {' | '.join(names)} |"
    yield "|---" * (len(names) + 2) + "|"
    for first in range(0, len(done), len(names)):
        times = [f"{phase.seconds * 1e3:.3f}" for phase in done[first : first + len(names)]]
        yield f"| {done[first].decay} | {done[first].length} | {' | '.join(times)} |"


def received(summary: Summary, ranks: int, spans: int, way: str) -> int:
    """Bytes that a rank receives by the all-gather of states in fp32, of one row."""
    state, transition = summary.numbers
    return (ranks - 1) * spans * summary.heads * (state + (transition if way == "forward" else 0)) * 4


def _hidden_lines(done: list[Phase], shape: KernelSizes) -> Iterator[str]:
    yield "\nIts exchange of states, modelled, and what intra would leave of it to wait for, ms, forward + backward:\n"
    yield (
        "| decay | tokens per rank | ranks | spans a rank | "
        + " | ".join(f"exchange, {link} | exposed" for link in LINKS)
        + " |\n"
        + "|---" * (4 + 2 * len(LINKS))
        + "|"
    )
    heads = shape.model["heads"]
    width = shape.model["dim"] // heads
    intra = {(p.decay, p.length, p.way): p.seconds for p in done if p.phase == "intra"}
    for decay, length in dict.fromkeys((decay, length) for decay, length, _ in intra):
        summary = Summary(heads=heads, key=width, value=width, transition=decay)
        for ranks in RANKS:
            for spans in (1, 2):  # contiguous and zigzag
                texts = []
                for rate in LINKS.values():
                    exchange = [received(summary, ranks, spans, way) / rate for way in WAYS]
                    exposed = [max(0.0, x - intra[decay, length, way]) for x, way in zip(exchange, WAYS, strict=True)]
                    texts += [" + ".join(f"{x * 1e3:.3f}" for x in times) for times in (exchange, exposed)]
                yield f"| {decay} | {length} | {ranks} | {spans} | {' | '.join(texts)} |"
