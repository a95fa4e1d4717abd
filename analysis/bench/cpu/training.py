"""The training of the quickstart model: two sequence-parallel ranks of one thread each against one process of two."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from analysis.bench.ranks.launch import ROOT, launch
from analysis.bench.ranks.network import loopback
from analysis.bench.result import Claim, Result, Row
from analysis.bench.sizes import Sizes
from analysis.tables import Table

PROCESSES = {"sp=2, one thread each": 2, "one process, two threads": 1}  # on two cores


def model(sizes: Sizes, out: Path) -> Result:
    """Compare the quickstart's training on two sequence-parallel ranks with training on one process."""
    length = sizes.model_length
    rows = {name: Row(contender=name, length=length) for name in PROCESSES}
    for repetition in range(sizes.model_repetitions):
        for name, processes in PROCESSES.items():
            folder = out / f"{name.replace('=', '').replace(',', '').replace(' ', '-')}-{repetition}"
            size = f"data.length={length}", f"train.steps={sizes.model_steps}", "train.batch=1"
            rows[name].values.append(statistics.median(train_quickstart(folder, processes, *size)))
    lines = tuple(
        (row.contender, str(length), f"{row.median:,.0f}", f"{min(row.values):,.0f} to {max(row.values):,.0f}")
        for row in rows.values()
    )
    header = ("contender", "T", "median tokens/s", "slowest to fastest")
    sp, one = rows.values()
    return Result(
        title=f"training the quickstart model on {length} tokens a step, fp32, two cores",
        unit="tokens per second",
        body=[Table(header=header, rows=lines, numbers=frozenset(header[1:]))],
        rows=list(rows.values()),
        claims=[Claim(what="sp=2 over one process, tokens/s", measured=sp.median / one.median, at_least=1.0)],
    )


def train_quickstart(folder: Path, processes: int, *overrides: str, tree: Path = ROOT) -> list[float]:
    """Train in a fresh run folder, with the recipes of a checkout. Return the tokens/s of all steps but the first."""
    threads = 2 // processes
    command = [
        sys.executable, "-m", "recipes.train", "recipes/quickstart.yaml",
        f"out={folder.parent.absolute()}", f"name={folder.name}", f"train.threads={threads}", "train.device=cpu",
        "train.validation_sequences=2", "train.sample=0", "optim.warmup=0", "wandb.mode=disabled",
        "checkpoint.resume=never", *overrides,
    ]  # fmt: skip
    launch(command, loopback(processes), threads, tree)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["tokens_per_second"] for line in metrics if line["kind"] == "train"][1:]
