"""The compilation of every contender's kernels, in a process for each, all at once.

    python -m analysis.bench.gpu.compilation

A benchmark that runs later finds them in Triton's cache. Which of its configurations a kernel of fla-core takes is
chosen there, while nothing else runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from analysis.bench.device import allow_any_triton, default_device
from analysis.bench.gpu.contenders import BOTH, FORWARD, draw_inputs, find_contenders
from analysis.bench.gpu.operators import call_of
from analysis.bench.sizes import KernelSizes

ROOT = Path(__file__).parents[3]
LACKING = 77  # the exit code of a program that says what it needs and does not find here


def compile_one(name: str, shape: KernelSizes) -> None:
    """Call a contender, forward and backward, or forward if it has no backward pass here."""
    allow_any_triton()
    device = default_device()
    contenders, _ = find_contenders(device, shape.softmax_until)
    one = next(one for one in contenders if one.name == name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    forms, do = draw_inputs(shape.heads[0], shape.tuned_at, shape.width, dtype, device)
    try:
        call_of(one, forms[one.decay], do, BOTH)()
    except RuntimeError:
        call_of(one, forms[one.decay], do, FORWARD)()


def compile_all() -> int:
    """Compile all contenders at once, print which fail, and return the exit code."""
    if default_device().type != "cuda":
        print("needs CUDA")
        return LACKING
    contenders, notes = find_contenders(default_device(), KernelSizes().softmax_until)
    environment = os.environ | {"FLA_CACHE_RESULTS": "0"}
    command = [sys.executable, "-m", "analysis.bench.gpu.compilation"]
    running = {one.name: subprocess.Popen([*command, one.name], cwd=ROOT, env=environment) for one in contenders}
    failed = [name for name, process in running.items() if process.wait()]
    print(*notes, f"{len(running)} contenders, failed: {', '.join(failed) or 'none'}", sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compile_one(sys.argv[1], KernelSizes())
    else:
        sys.exit(compile_all())
