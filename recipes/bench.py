"""Speed, measured in one run: ``python -m recipes.bench [linear] [model] [--quick] [--out runs/bench]``.

linear  hsp.linear_attention, forward and backward on one device with two threads, beside fla-core's naive chunk form of
        simple GLA and torch's causal SDPA
model   training of the quickstart model on 16K tokens: two sequence-parallel ranks of one thread each, beside one
        process of two threads

Contenders take turns in every repetition, so that a busy moment of the machine hits all of them. A table gives medians
and the span from fastest to slowest; report.md and results.json, with commit, versions and command, lie in OUT/NAME.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp

THREADS = 2
HEADS, KEY, VALUE = 4, 64, 64
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a benchmark measures; `quick` sizes only show that it works."""

    lengths: tuple[int, ...] = (4096, 16384, 65536)
    compared: tuple[int, ...] = (4096, 16384)  # the others' quadratic or autograd memory ends there
    repetitions: int = 7
    model_length: int = 16384
    model_steps: int = 5
    model_repetitions: int = 3


QUICK = Sizes(lengths=(128, 256), compared=(128,), repetitions=2, model_length=128, model_steps=2, model_repetitions=1)


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


# -- linear ----------------------------------------------------------------------------------------------------------

Timed = Callable[[], object]


def linear(sizes: Sizes, out: Path) -> Result:
    """Seconds of a forward and backward of each contender at each length."""
    torch.set_num_threads(THREADS)
    cases = {length: contenders(length, length in sizes.compared) for length in sizes.lengths}
    rows = {(name, length): Row(contender=name, length=length) for length in cases for name in cases[length]}
    for repetition in range(-1, sizes.repetitions):  # the first round warms up
        for length, timed in cases.items():
            for name, run in timed.items():
                start = time.perf_counter()
                run()
                if repetition >= 0:
                    rows[name, length].values.append(time.perf_counter() - start)

    ours = {length: rows[OURS, length].median for length in sizes.lengths}
    lines = [
        f"| {row.contender} | {row.length} | {row.median * 1e3:.1f} | {min(row.values) * 1e3:.1f} to "
        f"{max(row.values) * 1e3:.1f} | {row.median / row.length * 1e6:.2f} | {row.median / ours[row.length]:.2f} |"
        for row in rows.values()
    ]
    claims = []
    for length in sizes.compared:
        for name, bound in ((NAIVE, {4096: 3.5, 16384: 10.0}.get(length, 1.0)), (SDPA, 1.0)):
            ratio = rows[name, length].median / ours[length]
            claims.append(Claim(what=f"times faster than {name}, T={length}", measured=ratio, at_least=bound))
    first, last = sizes.lengths[0], sizes.lengths[-1]
    growth = (ours[last] / last) / (ours[first] / first)
    claims.append(Claim(what=f"time per token at T={last} over T={first}", measured=growth, at_most=1.2))
    return Result(
        title=f"linear_attention, forward + backward, fp32, B=1, H={HEADS}, K=V={KEY}, {THREADS} threads",
        unit="seconds",
        header="| contender | T | median ms | fastest to slowest | us/token | times ours |\n|---|---|---|---|---|---|",
        lines=lines,
        rows=list(rows.values()),
        claims=claims,
    )


OURS, NAIVE, SDPA = "linear_attention [B,T,H]", "fla-core naive_chunk_simple_gla", "torch causal SDPA"


def contenders(length: int, compared: bool) -> dict[str, Timed]:
    """Forward-and-backward calls at one length, over the same random tensors."""
    torch.manual_seed(0)
    q, k, v, d_o = (torch.randn(1, length, HEADS, width) for width in (KEY, KEY, VALUE, VALUE))
    gate = F.logsigmoid(torch.randn(1, length, HEADS, KEY)) / 16  # as GLA starts: decays of 0.9 and more
    decays = {OURS: gate[..., 0], "linear_attention [B,T,H,K]": gate, "linear_attention [H]": gate[0, 0, :, 0]}

    def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
        o = hsp.linear_attention(q, k, v, log_decay=g)
        assert isinstance(o, Tensor)
        return o

    timed = {name: forward_backward(ours, (q, k, v, g), d_o) for name, g in decays.items()}
    timed["linear_attention, no decay"] = forward_backward(ours, (q, k, v), d_o)
    if compared:
        from fla.ops.simple_gla.naive import naive_chunk_simple_gla

        timed[NAIVE] = forward_backward(
            lambda *inputs: naive_chunk_simple_gla(*inputs)[0], (q, k, v, gate[..., 0]), d_o
        )
        by_head = [x.transpose(1, 2).contiguous() for x in (q, k, v, d_o)]
        timed[SDPA] = forward_backward(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), by_head[:3], by_head[3]
        )
    return timed


def forward_backward(fn: Callable[..., Tensor], inputs: Sequence[Tensor], d_o: Tensor) -> Timed:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(fn(*leaves), leaves, d_o)


# -- model -----------------------------------------------------------------------------------------------------------


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


# -- report ----------------------------------------------------------------------------------------------------------


def provenance() -> dict[str, object]:
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join(["python -m recipes.bench", *sys.argv[1:]]),
        "commit": commit or None,
        "uncommitted_changes": bool(changed),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "fla-core": version("fla-core")},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write(result: Result, facts: dict[str, object], folder: Path) -> str:
    """report.md and results.json; returns the report."""
    report = "\n".join(
        [
            f"## {result.title}\n",
            result.header,
            *result.lines,
            "\n| ratio of medians | measured | bound | holds |\n|---|---|---|---|",
            *(claim.line() for claim in result.claims),
            f"\n`{facts['command']}` at commit {facts['commit']}, torch {torch.__version__}.",
        ]
    )
    values = {**facts, "unit": result.unit, "rows": result.rows, "claims": result.claims}
    (folder / "report.md").write_text(report + "\n")
    (folder / "results.json").write_text(json.dumps(values, default=asdict, indent=1) + "\n")
    return report


BENCHES: dict[str, Callable[[Sizes, Path], Result]] = {"linear": linear, "model": model}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench", description="Speed tables of the README.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all if none is given")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in BENCHES]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(BENCHES)}")
    facts = provenance()
    for name in options.names or BENCHES:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        print(f"measuring {name}: minutes, on a machine that does nothing else ...", flush=True)
        print(write(BENCHES[name](QUICK if options.quick else Sizes(), folder), facts, folder) + "\n", flush=True)


if __name__ == "__main__":
    main()
