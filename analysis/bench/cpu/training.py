"""Training of the quickstart model: two sequence-parallel ranks of one thread each, beside one process of two."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from analysis.bench.measure import ROOT, Claim, Result, Row, Sizes


def model(sizes: Sizes, out: Path) -> Result:
    """Tokens per second of recipes.train, a program start per repetition, its first step left out."""
    launch = {
        "sp=2, one thread each": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], 1),
        "one process, two threads": ([], 2),
    }
    length = sizes.model_length
    rows = {name: Row(contender=name, length=length) for name in launch}
    for repetition in range(sizes.model_repetitions):
        for name, (launcher, threads) in launch.items():
            run = out / f"{name.replace('=', '').replace(',', '').replace(' ', '-')}-{repetition}"
            command = [sys.executable, *launcher, "-m", "recipes.train", str(ROOT / "recipes/quickstart.yaml")]
            command += [f"out={run.parent}", f"name={run.name}", f"data.length={length}", "train.batch=1"]
            command += [
                f"train.steps={sizes.model_steps}",
                "optim.warmup=0",
                "train.validation_sequences=1",
                "train.sample=0",
            ]
            command += [
                f"train.threads={threads}",
                "train.device=cpu",
                "wandb.mode=disabled",
                "checkpoint.resume=never",
            ]
            env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            speeds = [line["tokens_per_second"] for line in metrics if line["kind"] == "train"]
            rows[name].values.append(statistics.median(speeds[1:]))
    sp, one = rows.values()
    lines = [
        f"| {row.contender} | {length} | {row.median:,.0f} | {min(row.values):,.0f} to {max(row.values):,.0f} |"
        for row in rows.values()
    ]
    ratio = sp.median / one.median
    return Result(
        title=f"training the quickstart model on {length} tokens a step, fp32, two cores",
        unit="tokens per second",
        header="| contender | T | median tokens/s | slowest to fastest |\n|---|---|---|---|",
        lines=lines,
        rows=list(rows.values()),
        claims=[Claim(what="sp=2 over one process, tokens/s", measured=ratio, at_least=1.0)],
    )
