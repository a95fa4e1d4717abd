"""Every kernel once at small odd shapes, forward and backward, for compute-sanitizer to watch.

python -m tests.gpu.memcheck --watched        by compute-sanitizer; exit code 77 where it cannot be had
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from analysis.bench.device import allow_any_triton
from tests.gpu.linear import Problem

ROOT = Path(__file__).parents[2]
LACKING = 77  # the exit code of a check that this machine cannot run
DOCUMENTS = (0, 1, 70, 131)


def problems() -> list[Problem]:
    """Odd lengths and widths, every decay, and every form."""
    small = {"length": 131, "heads": 2, "groups": 1, "key": 37, "value": 53}
    found = [Problem(decay=decay, states=True, **small) for decay in (None, "fixed", "scalar", "vector")]
    found += [Problem(decay=decay, batch=1, documents=DOCUMENTS, spans=2, **small) for decay in ("scalar", "vector")]
    found += [Problem(decay="vector", bonus=True, **small), Problem(decay="scalar", normalize=True, **small)]
    return [*found, Problem(decay="scalar", dtype=torch.float32, **small)]


def main(device: torch.device) -> None:
    print(allow_any_triton())
    for problem in problems():
        for name, value in problem.results(problem.inputs(0, device), "triton").items():
            assert torch.isfinite(value).all(), f"{problem}: {name}"
        print(problem, flush=True)


def watched(seconds: float | None = None) -> tuple[int, str]:
    """This program by compute-sanitizer: its exit code, LACKING where it cannot watch the device, and what it says."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return LACKING, "compute-sanitizer is not on the PATH"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.memcheck"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    told = run.stdout + run.stderr
    if "Device not supported" in told:
        return LACKING, f"{told}\ncompute-sanitizer does not support this device"
    return run.returncode, told


if __name__ == "__main__":
    if "--watched" in sys.argv:
        code, told = watched()
        print(told)
        sys.exit(code)
    main(torch.device("cuda"))
