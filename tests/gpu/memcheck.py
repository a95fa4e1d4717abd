"""Every kernel once at small odd shapes, forward and backward, for compute-sanitizer to watch.

python -m tests.gpu.memcheck --watched        by compute-sanitizer; exit code 77 where it cannot be had
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
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


def watched(seconds: float = 3600.0, show: bool = False) -> tuple[int, str]:
    """This program by compute-sanitizer: its exit code, LACKING where it cannot watch the device, and what it says, to
    `show` as it comes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return LACKING, "compute-sanitizer is not on the PATH"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.memcheck"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = threading.Timer(seconds, run.kill)
    end.start()
    told = ""
    with run:
        assert run.stdout is not None
        for line in run.stdout:
            told += line
            if show:
                print(line, end="", flush=True)
    end.cancel()
    if "Device not supported" in told:
        return LACKING, f"{told}\ncompute-sanitizer does not support this device"
    return run.returncode, told


if __name__ == "__main__":
    if "--watched" in sys.argv:
        code, told = watched(show=True)
        print(told.splitlines()[-1] if code == LACKING else f"exit code {code}")
        sys.exit(code)
    main(torch.device("cuda"))
