"""Measure speed and memory: ``python -m analysis.bench [NAME ...] [--quick] [--out runs/bench]``.

Contenders take turns in every repetition, so that a busy moment of the machine hits all of them. A table gives medians
and the span from fastest to slowest.
"""

from __future__ import annotations

import argparse
import inspect
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from analysis.bench.cpu.experts import experts
from analysis.bench.cpu.limit import limit
from analysis.bench.cpu.mixers import mixers
from analysis.bench.cpu.operators import delta, linear
from analysis.bench.cpu.training import model
from analysis.bench.gpu.launches import launches
from analysis.bench.gpu.operators import kernels
from analysis.bench.gpu.tune import tune
from analysis.bench.provenance import provenance
from analysis.bench.ranks.memory import memory
from analysis.bench.ranks.scheduling import balance, exchange_vs_length, overlap
from analysis.bench.ranks.strategies import strategies
from analysis.bench.result import Result, write
from analysis.bench.sizes import QUICK, Sizes
from recipes.allocator import keep_freed_memory

BENCHES: dict[str, Callable[[Sizes, Path], Result]] = {
    bench.__name__: bench
    for bench in (
        limit, linear, delta, mixers, experts, model, strategies, overlap, balance, exchange_vs_length, memory,
        launches, tune, kernels,
    )
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    summaries = (f"  {name:<20}{inspect.getdoc(bench)}" for name, bench in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="python -m analysis.bench",
        description="Measure speed and memory. Each benchmark prints a table, and writes report.md and results.json\n"
        "to OUT/NAME, with the command, commit and versions that made them.",
        epilog="benchmarks:\n" + "\n".join(summaries),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a benchmark of the list below; default: all of them")
    parser.add_argument("--quick", action="store_true", help="take tiny sizes: seconds, only to see that it works")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="the folder of results (%(default)s)")
    parser.add_argument("--seconds", type=float, help="the time that each of `tune` and `kernels` may take")
    parser.add_argument("--against", type=Path, help="a checkout of another commit, which `limit` measures in turn")
    parser.add_argument("--commit", help="the commit of this tree, if it is a copy without git")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks that are named, one after the other."""
    parser = _parser()
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in BENCHES]:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(BENCHES)}")
    sizes = replace(QUICK if options.quick else Sizes(), against=options.against)
    if options.seconds is not None:
        sizes = replace(sizes, kernels=sizes.kernels.within(options.seconds))
    keep_freed_memory()
    facts = provenance(options.commit)
    for name in options.names or BENCHES:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        print(f"measuring {name}: minutes, on a machine that does nothing else ...", flush=True)
        result = BENCHES[name](sizes, folder)
        print(write(result, facts, folder) + "\n", flush=True)
        if result.cut:
            sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as with Ctrl-C, hosts made of namespaces go too
    main()
