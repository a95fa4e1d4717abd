"""The facts of a machine, in a page: versions, devices, and the tools that checks use. Exit code 77 without CUDA."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from analysis.bench.device import device_facts
from analysis.first.stages import LACKING
from recipes import provenance

PACKAGES = ("triton", "fla-core", "flash-attn", "einops", "pytest", "pytest-xdist", "numpy", "omegaconf", "wandb")
TOOLS = ("nvidia-smi", "compute-sanitizer", "ncu", "nsys", "nvcc")


def main() -> int:
    """Print the facts, and return the exit code."""
    for name, version in provenance.versions(PACKAGES).items():
        print(f"{name:<20}{version or 'not installed'}")
    for name, value in provenance.machine().items():
        print(f"{name:<20}{value}")
    for tool in TOOLS:
        print(f"{tool:<20}{shutil.which(tool) or 'not on the PATH'}")
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        programs = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        for path in sorted(programs.glob("ptxas*")):
            said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.strip()
            print(f"{path.name:<20}{said.splitlines()[-1] if said else 'does not run'}")
    if shutil.which("nvidia-smi"):
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    facts = device_facts()
    print("needs CUDA" if facts is None else ", ".join(f"{name} {value}" for name, value in facts.items()))
    return LACKING if facts is None else 0


if __name__ == "__main__":
    sys.exit(main())
