"""Freed memory is kept: the tensors of a step that is made again cost hardly any page faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys, torch
from recipes.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
faults = []
for _ in range(20):  # glibc takes some steps to find places that a tensor and its alignment fit into
    torch.ones(10_000_000).add(1)  # two tensors of 38 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[-1] - faults[-6]) // 5)
"""


def faults(how: str) -> int:
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=root, capture_output=True, text=True)
    if run.returncode == 3:
        pytest.skip("not glibc")
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_freed_memory_is_kept() -> None:
    assert 10 * faults("keep") < faults("as it is")
