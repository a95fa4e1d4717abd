"""Speed, measured in one run: ``python -m analysis.bench [NAME ...] [--quick] [--out runs/bench]``.

linear  hsp.linear_attention beside fla-core's naive chunk form of simple GLA and torch's causal SDPA
delta   hsp.delta_rule beside the chunk form of the gated delta rule in transformers
mixers  every linear mixer at a short and at a long sequence
model   training of the quickstart model, two sequence-parallel ranks beside one process
strategies  every exchange and baseline on every kind of layer, four ranks on a slow link
overlap     how much of a gather is left to wait for when it is overlapped
balance     causal softmax in the zigzag layout beside the contiguous one
flat        time of a linear layer's exchange, from 4K to 64K tokens per rank
memory  memory of softmax attention, one key head at a time beside all at once, four ranks
kernels on a CUDA device: linear attention beside fla-core's kernels and flash attention, a rank's step of a model of
        1B, what its exchange would leave to wait for; without such a device tiny sizes, to see that it works

Contenders take turns in every repetition, so that a busy moment of the machine hits all of them. A table gives medians
and the span from fastest to slowest; report.md and results.json, with commit, versions and command, lie in OUT/NAME.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.bench.cpu.mixers import mixers
from analysis.bench.cpu.operators import delta, linear
from analysis.bench.cpu.training import model
from analysis.bench.gpu.operators import kernels
from analysis.bench.measure import QUICK, Result, Sizes, provenance, write
from analysis.bench.ranks.memory import memory
from analysis.bench.ranks.scheduling import balance, flat, overlap
from analysis.bench.ranks.strategies import strategies
from recipes.allocator import keep_freed_memory

BENCHES: dict[str, Callable[[Sizes, Path], Result]] = {
    "linear": linear,
    "delta": delta,
    "mixers": mixers,
    "model": model,
    "strategies": strategies,
    "overlap": overlap,
    "balance": balance,
    "flat": flat,
    "memory": memory,
    "kernels": kernels,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.bench", description="Speed tables of the README.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all if none is given")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--commit", help="of the tree, where it is a copy without git")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in BENCHES]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(BENCHES)}")
    keep_freed_memory()
    facts = provenance(options.commit)
    for name in options.names or BENCHES:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        print(f"measuring {name}: minutes, on a machine that does nothing else ...", flush=True)
        print(write(BENCHES[name](QUICK if options.quick else Sizes(), folder), facts, folder) + "\n", flush=True)


if __name__ == "__main__":
    main()
