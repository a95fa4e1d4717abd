"""Every kernel compiles for sm_80, sm_90 and sm_100, into the registers and the shared memory that there are."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.packages import needs

pytestmark = needs("triton")

ROOT = Path(__file__).parents[3]


def run_compiler(program: str, folder: Path, *arguments: str) -> str:
    """What the program beside this file prints, in an interpreter that makes kernels for devices."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.hybrid_sp.kernels.{program}", *arguments]
    run = subprocess.run(
        command, cwd=ROOT, env=env | {"TRITON_CACHE_DIR": str(folder / "cache")}, capture_output=True, text=True
    )
    assert not run.stderr.count("Traceback"), run.stderr
    return run.stdout


def compiled(grid: str, folder: Path) -> list[dict[str, Any]]:
    """A grid of aot.py, measured; raises AssertionError for what does not fit the chip."""
    print(run_compiler("aot", folder, "--grid", grid, "--json", str(folder / "built.json")))
    built = json.loads((folder / "built.json").read_text())
    assert all(one["registers"] > 0 for one in built if not one["error"])
    faults = [
        f"{one['kernel']} ({one['task']}), {one['tensors']}, sm_{one['arch']}: {one['fault']}"
        for one in built
        if one["fault"]
    ]
    assert not faults, "\n".join(faults)
    return built


def kernels() -> set[str]:
    """The functions of the room of kernels that Triton compiles and others do not call: by their names."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "hybrid_sp/kernels/gpu").glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    jitted = [one for one in functions if any("triton.jit" in ast.unparse(name) for name in one.decorator_list)]
    return {one.name for one in jitted if one.name.endswith("_kernel")}


def test_kernels_fit_a_chip(tmp_path: Path) -> None:
    built = compiled("first", tmp_path)
    assert {one["kernel"] for one in built} == kernels(), "a kernel that no operator launches, or of another name"


@pytest.mark.slow
def test_kernels_of_every_width_fit_every_chip(tmp_path: Path) -> None:
    built = compiled("main", tmp_path)
    for arch in (80, 90, 100):
        here = [one for one in built if one["arch"] == arch]
        assert {one["kernel"] for one in here} == kernels()
        for width in (64, 128, 256):
            assert {one["kernel"] for one in here if one["tensors"] == f"bf16 {width}x{width}"} >= {"scan_kernel"}


@pytest.mark.slow
def test_candidates_for_launch_parameters_fit_hopper(tmp_path: Path) -> None:
    """So `python -m analysis.bench tune` spends its minutes on measuring."""
    built = compiled("candidates", tmp_path)
    assert len({one["stages"] for one in built}) > 2


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return json.loads(run_compiler("greedy", tmp_path_factory.mktemp("greedy")).splitlines()[-1])


@pytest.mark.slow
def test_what_does_not_fit_is_seen(greedy: dict[str, Any]) -> None:
    faults = {(kernel, arch): fault for kernel, arch, fault in greedy["faults"]}
    for arch in (80, 90):
        assert "bytes spilled a thread, more than" in faults["spilling_kernel", arch]
        assert f"bytes of shared memory, of which sm_{arch} has" in faults["crowding_kernel", arch]
        assert "range must be a power of 2" in faults["broken_kernel", arch]
        assert faults["modest_kernel", arch] == ""


@pytest.mark.slow
def test_arguments_are_told_of_as_at_a_launch(greedy: dict[str, Any]) -> None:
    """Multiples of 16 by their place; one, None and constants are part of the kernel; others compile anew."""
    specs = greedy["specs"]
    names = [name for name, *_ in specs]
    assert names == ["spilling_kernel", "crowding_kernel", "broken_kernel", "modest_kernel", "modest_kernel"]
    types = {"p_x": "*bf16", "p_none": "constexpr", "n": "i32", "one": "constexpr", "unaligned": "i32", "flag": "u1"}
    types |= {"scale": "fp32", "WORD": "constexpr", "WIDTH": "constexpr"}
    assert specs[3][1:] == [types, [0, 2]]
    assert specs[4][1:] == [types | {"unaligned": "i64"}, [2, 4]]
