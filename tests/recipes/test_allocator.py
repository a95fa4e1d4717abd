"""Freed memory is kept: the tensors of a step that is made again cost hardly any page faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys, torch
from recipes.allocator import keep_freed_memory

def per_step():
    faults = []
    for _ in range(20):  # glibc takes some steps to find places that a tensor and its alignment fit into
        torch.ones(10_000_000).add(1)  # two tensors of 38 MiB
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return (faults[-1] - faults[-6]) // 5

as_it_is = per_step()
if not keep_freed_memory():
    sys.exit(3)
print(as_it_is, per_step())
"""


def test_freed_memory_is_kept() -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True)
    if run.returncode == 3:
        pytest.skip("not glibc")
    assert run.returncode == 0, run.stderr
    as_it_is, kept = map(int, run.stdout.split())
    assert 10 * kept < as_it_is
