"""Kernels compiled ahead, on all cores, so that the process that measures only times them.

fla-core tries dozens of configurations of each of its kernels at their first call. Compiled one after the other they
take minutes. `compile_ahead` starts processes that each compile a share of them, and one of our decays, into Triton's
cache on disk.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from analysis.bench.device import Budget
from analysis.bench.gpu.contenders import Contender, fla_contenders, fla_missing, inputs, ours
from analysis.bench.measure import ROOT, KernelSizes

TUNING_MILLISECONDS = (10, 40)  # of warm-up and of repetitions for each configuration; Triton's own are 25 and 100


def tune_quickly() -> None:
    """Shorten the timing of each configuration, where this version of Triton lets us."""
    try:
        from triton.runtime import driver
        from triton.testing import do_bench

        warmup, rep = TUNING_MILLISECONDS
        driver.active.get_benchmarker = lambda: functools.partial(do_bench, warmup=warmup, rep=rep)
    except (ImportError, AttributeError):
        return


def compile_ahead(shape: KernelSizes, budget: Budget) -> None:
    """Compile what `shape` needs, with all cores but one; stops when the time is over."""
    count = max(1, (os.cpu_count() or 1) - 1)
    environment = os.environ | {
        "FLA_CACHE_RESULTS": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    words = map(str, (count, shape.width, shape.tuned_at, *shape.heads))
    command = [sys.executable, "-m", "analysis.bench.gpu.compiling", *words]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    running = [subprocess.Popen([*command, str(share)], **quiet) for share in range(count)]
    for process in running:
        try:
            process.wait(budget.left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def compile_share(count: int, width: int, length: int, heads: list[int], share: int) -> None:
    """One of our decays, and every `count`-th configuration of fla-core's kernels, from number `share` on."""
    device = torch.device("cuda")
    for one in ours()[share : share + 1]:
        _compile(one, heads[0], length, width, device)
    if fla_missing(device):
        return
    _choose_untimed(lambda configs: [*configs[share % len(configs) :: count], configs[0]])
    for one in fla_contenders():
        for here in heads:
            _compile(one, here, 256, width, device)


def _compile(one: Contender, heads: int, length: int, width: int, device: torch.device) -> None:
    forms, do = inputs(heads, length, width, torch.bfloat16, device)
    try:
        torch.autograd.grad(one.call(*forms[one.decay]), forms[one.decay], do)
    except Exception as error:  # it will be said where it is measured; what came before is compiled
        print(f"{one.name}, H={heads}: {error}", file=sys.stderr)


def _choose_untimed(choose: Callable[[list[Any]], list[Any]]) -> None:
    """Triton compiles and runs once what `choose` makes of a kernel's configurations."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    tuner: Any = Autotuner
    prune = tuner.prune_configs

    def once(call: Callable[[], Any], **_: Any) -> list[float]:
        call()
        return [0.0, 0.0, 0.0]

    tuner.prune_configs = lambda self, *args, **kwargs: choose(prune(self, *args, **kwargs))
    driver.active.get_benchmarker = lambda: once


if __name__ == "__main__":
    of, columns, tokens, *every, own = (int(word) for word in sys.argv[1:])
    compile_share(of, columns, tokens, every, own)
