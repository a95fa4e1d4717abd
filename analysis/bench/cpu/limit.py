"""The distance of the operators from what the processor can do, and from plain torch; with another commit in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from analysis.bench.cpu import probe
from analysis.bench.cpu.training import PROCESSES, train_quickstart
from analysis.bench.ranks.launch import ROOT
from analysis.bench.result import Claim, Result, Row
from analysis.bench.sizes import Sizes
from analysis.tables import Table

BEFORE = " before"  # ends the names of the rows of the other commit
GOALS = dict(zip(probe.KINDS, (0.5, 0.4, 0.2, 0.3, 0.15), strict=True))  # least shares of the ceiling
Rows = Mapping[tuple[str, int], Row]


def limit(sizes: Sizes, out: Path) -> Result:
    """Measure the share of the processor's speed that the operators reach, and the cost of one short call."""
    trees = {"": ROOT} | ({BEFORE: sizes.against.absolute()} if sizes.against else {})
    rows: dict[tuple[str, int], Row] = {}
    for _ in range(sizes.rounds):
        for label, tree in trees.items():
            for part in (*probe.PARTS, "phases", "ranks"):
                for (name, length), seconds in _probe(part, tree, sizes).items():
                    key = f"{part}: {name}{label}", length
                    rows.setdefault(key, Row(contender=key[0], length=length)).values.extend(seconds)
    peaks = {
        name + label: (length, value)
        for label, tree in trees.items()
        for (name, length), (value,) in _probe("memory", tree, sizes).items()
    }
    training: dict[str, list[float]] = {}
    for repetition in range(sizes.rounds if sizes.against else 0):
        for label, tree in trees.items():
            for name, processes in PROCESSES.items():
                folder = out / f"{repetition}-{processes}{label.replace(' ', '-')}"
                size = f"data.length={sizes.short_model_length}", f"train.steps={sizes.short_model_steps}"
                speeds = train_quickstart(folder, processes, *size, tree=tree)
                training.setdefault(name + label, []).append(statistics.harmonic_mean(speeds))
    return Result(
        title="distance from the ceiling, forward + backward, fp32, B=1, H=4, K=V=64, two threads",
        unit="seconds",
        body=[_table(rows), _memory(peaks), *([_training(training)] if training else [])],
        rows=list(rows.values()),
        claims=[*_claims(rows, sizes), *_gains(training)],
        facts={"tokens_per_second": training, "peak_bytes": peaks},
    )


def _probe(part: str, tree: Path, sizes: Sizes) -> dict[tuple[str, int], list[float]]:
    """Time one part in a process of its own, in a checkout."""
    growth = sizes.lengths[0], sizes.lengths[-1]
    lengths = {"shares": sizes.compared, "growth": growth, "ranks": (probe.CHUNK,)}.get(part, sizes.compared[:1])
    repetitions = sizes.repetitions * (20 if part in ("small", "ranks") else 1)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2") if part == "ranks" else ()
    command = [sys.executable, *launcher, probe.__file__, part, json.dumps(lengths), str(repetitions)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed in {tree}:\n{run.stderr}")
    found = json.loads(run.stdout)
    return {(name.rsplit(", ", 1)[0], int(name.rsplit(", ", 1)[1])): seconds for name, seconds in found.items()}


def flops(length: int) -> float:
    """Count the FLOPs of the plain chunkwise form, forward and backward."""
    chunk, key, value = probe.CHUNK, probe.WIDTH, probe.WIDTH
    return (2 * chunk * (key + value) + 4 * key * value) * 3.5 * length * probe.HEADS


def _share(rows: Rows, kind: str, length: int, label: str = "") -> float:
    ceiling = (
        2 * probe.AT_ONCE * probe.SQUARES * probe.CHUNK**3 / rows[f"shares: {probe.CEILING}{label}", probe.CHUNK].median
    )
    return flops(length) / rows[f"shares: {kind}{label}", length].median / ceiling


def _table(rows: Rows) -> Table:
    header = ("measured", "T", "median ms", "fastest to slowest", "share of the ceiling", "speed over before")
    lines = []
    for (name, length), row in rows.items():
        kind, label = name.removeprefix("shares: ").removesuffix(BEFORE), BEFORE if name.endswith(BEFORE) else ""
        before = rows.get((name + BEFORE, length))
        lines.append(
            (
                name,
                str(length),
                f"{row.median * 1e3:.3g}",
                f"{min(row.values) * 1e3:.3g} to {max(row.values) * 1e3:.3g}",
                f"{_share(rows, kind, length, label):.2f}" if kind in GOALS and name.startswith("shares") else "",
                f"{before.median / row.median:.2f}" if before else "",
            )
        )
    return Table(header=header, rows=tuple(lines), numbers=frozenset(header[1:]))


def _memory(peaks: Mapping[str, tuple[int, float]]) -> Table:
    header = ("peak memory of a call, without its inputs", "T", "MB")
    lines = tuple((name, str(length), f"{value / 1e6:.1f}") for name, (length, value) in peaks.items())
    return Table(header=header, rows=lines, numbers=frozenset(header[1:]))


def _training(speeds: Mapping[str, list[float]]) -> Table:
    header = ("training the quickstart", "tokens/s", "slowest to fastest")
    lines = tuple(
        (name, f"{statistics.median(values):,.0f}", f"{min(values):,.0f} to {max(values):,.0f}")
        for name, values in speeds.items()
    )
    return Table(header=header, rows=lines, numbers=frozenset(header[1:]))


def _claims(rows: Rows, sizes: Sizes) -> list[Claim]:
    claims = [
        Claim(what=f"{kind}, share of the ceiling, T={length}", measured=_share(rows, kind, length), at_least=goal)
        for kind, goal in GOALS.items()
        for length in sizes.compared
    ]
    ours, plain = (rows[f"small: {name}", probe.CHUNK].median for name in (probe.SHORT, probe.PLAIN))
    claims.append(Claim(what="one chunk, time over plain torch", measured=ours / plain, at_most=2.0))
    ours, plain = (rows[f"ranks: {name}", probe.CHUNK].median for name in (probe.ON_RANKS, probe.PLAIN))
    what = "one chunk on each of two ranks, without waits, time over plain torch"
    claims.append(Claim(what=what, measured=ours / plain, at_most=2.5))
    first, last = sizes.lengths[0], sizes.lengths[-1]
    for kind in ("[B,T,H]", "delta rule [B,T,H]"):
        per_token = [rows[f"growth: {kind}", length].median / length for length in (first, last)]
        what = f"{kind}, time per token at T={last} over T={first}, no allocator setting"
        claims.append(Claim(what=what, measured=per_token[1] / per_token[0], at_most=1.05))
    ours, sdpa = (rows[f"softmax: {name}", sizes.compared[0]].median for name in (probe.OURS, probe.SDPA))
    return [
        *claims,
        Claim(what=f"softmax, speed over SDPA, T={sizes.compared[0]}", measured=sdpa / ours, at_least=0.95),
    ]


def _gains(speeds: Mapping[str, list[float]]) -> list[Claim]:
    return [
        Claim(
            what=f"quickstart, {name}, tokens/s over before",
            measured=statistics.median(speeds[name]) / statistics.median(speeds[name + BEFORE]),
            at_least=1.5,
        )
        for name in PROCESSES
        if speeds
    ]
