"""What a benchmark measures and how it is told: sizes, interleaved timing, rows, claims, report.md and results.json."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.bench.device import device_facts
from recipes import provenance as origin

THREADS = 2
PACKAGES = ("triton", "fla-core", "flash-attn", "transformers")  # of the kernels and of their peers
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class KernelSizes:
    """What `kernels` measures on a CUDA device; without one it takes the quick sizes, in fp32."""

    lengths: tuple[int, ...] = tuple(2**n for n in range(12, 19))  # 4K to 256K tokens
    heads: tuple[int, ...] = (16, 32)
    width: int = 128
    softmax_until: int = 65536  # its cost is quadratic
    tuned_at: int = 32768  # tokens at which fla-core chooses its configurations
    repetitions: int = 15
    copied: int = 2**32  # bytes
    side: int = 8192  # of the matrices whose product is the ceiling
    model: dict[str, Any] = field(
        default_factory=lambda: {"vocab": 128256, "dim": 2048, "depth": 16, "heads": 16, "mlp_dim": 8192}
    )
    model_lengths: tuple[int, ...] = (16384, 65536)  # tokens per rank
    model_steps: int = 5
    # That compiling the peers, the operators, the model and the phases may take, so that all is done in ten minutes.
    seconds: tuple[float, float, float, float] = (90.0, 220.0, 120.0, 30.0)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a benchmark measures; `quick` sizes only show that it works."""

    lengths: tuple[int, ...] = (4096, 16384, 65536)
    compared: tuple[int, ...] = (4096, 16384)  # the others' quadratic or autograd memory ends there
    repetitions: int = 7
    mixer_repetitions: int = 3
    model_length: int = 16384
    model_steps: int = 5
    model_repetitions: int = 3
    rank_length: int = 16384  # tokens of the whole sequence, where ranks are compared
    rank_repetitions: int = 15
    slow_repetitions: int = 2  # of contenders that take seconds
    tokens_per_rank: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    megabits: float = 40.0  # per second, of every rank's link
    overlap_repetitions: int = 20
    overlap_megabits: float = 120.0
    memory_length: int = 65536
    kernels: KernelSizes = KernelSizes()


QUICK = Sizes(
    lengths=(128, 256),
    compared=(128,),
    repetitions=2,
    mixer_repetitions=1,
    model_length=128,
    model_steps=2,
    model_repetitions=1,
    rank_length=256,
    rank_repetitions=2,
    slow_repetitions=1,
    tokens_per_rank=(64, 128),
    megabits=200.0,
    overlap_repetitions=2,
    overlap_megabits=200.0,
    memory_length=256,
    kernels=KernelSizes(
        lengths=(48, 96),
        heads=(1, 2),
        width=16,
        softmax_until=48,
        tuned_at=48,
        repetitions=2,
        copied=2**20,
        side=64,
        model={"vocab": 64, "dim": 32, "depth": 4, "heads": 2, "mlp_dim": 64},
        model_lengths=(48, 96),
        model_steps=2,
        seconds=(1.0, 600.0, 600.0, 600.0),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Repeated measurements of one contender at one length."""

    contender: str
    length: int
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A measured ratio beside the bound that it is held to."""

    what: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None

    def line(self) -> str:
        holds = (self.at_least is None or self.measured >= self.at_least) and (
            self.at_most is None or self.measured <= self.at_most
        )
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        return f"| {self.what} | {self.measured:.2f} | {bound} | {'yes' if holds else 'NO'} |"


@dataclass(frozen=True, kw_only=True)
class Result:
    title: str
    unit: str
    header: str
    lines: list[str]
    rows: list[Row]
    claims: list[Claim]
    facts: dict[str, Any] = field(default_factory=dict)  # what else results.json holds


Timed = Callable[[], object]


def timed_in_turns(cases: Mapping[int, Mapping[str, Timed]], repetitions: int) -> dict[tuple[str, int], Row]:
    """Seconds of every contender at every length, by name and length. The first round warms up and does not count."""
    torch.set_num_threads(THREADS)
    rows = {(name, length): Row(contender=name, length=length) for length in cases for name in cases[length]}
    for repetition in range(-1, repetitions):
        for length, contenders in cases.items():
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                if repetition >= 0:
                    rows[name, length].values.append(time.perf_counter() - start)
    return rows


def forward_backward(fn: Callable[..., Tensor], inputs: Sequence[Tensor], d_o: Tensor) -> Timed:
    """A call of fn on copies of the inputs, and the gradients of all of them."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(fn(*leaves), leaves, d_o)


HEADER = "| contender | T | median ms | fastest to slowest | us/token | times ours |\n|---|---|---|---|---|---|"


def lines_of(rows: Mapping[tuple[str, int], Row], ours: str) -> list[str]:
    """Table lines under HEADER; the last column compares with the contender called `ours` at the same length."""
    return [
        f"| {row.contender} | {row.length} | {row.median * 1e3:.1f} | {min(row.values) * 1e3:.1f} to "
        f"{max(row.values) * 1e3:.1f} | {row.median / row.length * 1e6:.2f} | "
        f"{row.median / rows[ours, row.length].median:.2f} |"
        for row in rows.values()
    ]


def growth(rows: Mapping[tuple[str, int], Row], name: str, lengths: Sequence[int]) -> Claim:
    """Time per token at the greatest length over that at the smallest."""
    (first, last) = (rows[name, length].median / length for length in (lengths[0], lengths[-1]))
    what = f"{name}, time per token at T={lengths[-1]} over T={lengths[0]}"
    return Claim(what=what, measured=last / first, at_most=1.2)


def provenance(commit: str | None = None) -> dict[str, Any]:
    """Command, commit (as told, where the tree is a copy without git), versions, machine and time."""
    return {
        "command": " ".join(["python -m analysis.bench", *sys.argv[1:]]),
        "commit": commit or origin.commit(),
        "uncommitted_changes": origin.is_modified(),
        "versions": {name: found for name, found in origin.versions(PACKAGES).items() if found is not None},
        "machine": {**origin.machine(), "load_before": os.getloadavg()[0]},
        "device": device_facts(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write(result: Result, facts: dict[str, Any], folder: Path) -> str:
    """report.md and results.json; returns the report."""
    device = f", {facts['device']['name']}" if facts["device"] else ""
    report = "\n".join(
        [
            f"## {result.title}\n",
            result.header,
            *result.lines,
            "\n| ratio of medians | measured | bound | holds |\n|---|---|---|---|",
            *(claim.line() for claim in result.claims),
            f"\n`{facts['command']}` at commit {facts['commit']}, torch {torch.__version__}{device}.",
        ]
    )
    values = {**facts, **result.facts, "unit": result.unit, "rows": result.rows, "claims": result.claims}
    (folder / "report.md").write_text(report + "\n")
    (folder / "results.json").write_text(json.dumps(values, default=asdict, indent=1) + "\n")
    return report
