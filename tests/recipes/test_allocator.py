"""Freed memory is kept: the tensors of a step that is made again cost hardly any page faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys, torch
from layers.registry import Place, mixer_spec
from recipes.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
place = Place(dim=256, heads=4, kv_heads=4, layer=0, depth=8, norm_eps=1e-6, rope_base=1e4)
mixer, x = mixer_spec("linear").build(place), torch.randn(1, 40_000, 256)  # 39 MiB
faults = []
for _ in range(5):
    mixer(x)[0].sum().backward()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-2])
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
