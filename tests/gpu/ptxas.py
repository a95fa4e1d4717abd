"""The kernels as two assemblers make them: Triton's `ptxas`, and the newer `ptxas-blackwell` that it carries too.

    python -m tests.gpu.ptxas FOLDER                  fixed calls by both: which kernels differ, in which tensors
    python -m tests.gpu.ptxas FOLDER --tests [ARGS]   test_device.py by both as well, ARGS are pytest's: make gpu-test

ptxas 12.8 miscompiles some matrix products of a Hopper (triton #11366, #11781, fla-core #1262). A kernel that finds
equal arguments and leaves other ones is told by name. Bits may differ for good reasons, such as a fused multiply-add:
so a difference is an error if it is more than the bound on what a backend may be off. Without a Hopper there is one
ptxas, and nothing to compare: exit code 77.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis.bench.device import allow_any_triton, default_device
from analysis.bench.gpu.interception import in_place_of_launch
from tests.gpu import memcheck
from tests.gpu.linear import BOUND, Problem
from tests.gpu.memcheck import LACKING
from tests.support.oracle import relative

ROOT = Path(__file__).parents[2]
HOPPER = 9
BUNDLED, NEWER = NAMES = ("ptxas", "ptxas-blackwell")
CACHE = ROOT / "runs" / "gpu-cache"


class Step(NamedTuple):
    """One launch: the kernel with its constants, and digests of its tensors before and after."""

    kernel: str
    before: list[str]
    after: list[str]


class Dump(NamedTuple):
    """One problem by one ptxas: its launches in order, and its outputs and gradients."""

    steps: list[Step]
    results: dict[str, Tensor]


def problems() -> list[Problem]:
    """Every kernel at the widths of models and at odd ones, in all dtypes."""
    wide = [Problem(decay=decay, key=128, value=128, states=True) for decay in (None, "fixed", "scalar", "vector")]
    narrow = [Problem(decay=decay, spans=2) for decay in ("scalar", "vector")]
    other = [replace(wide[i], dtype=dtype) for i in (2, 3) for dtype in (torch.float16, torch.float32)]
    return [*wide, *narrow, *other, *memcheck.problems()]


def digest(x: Tensor) -> str:
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha1(raw.numpy().tobytes()).hexdigest()


def run_problem(problem: Problem, device: torch.device) -> Dump:
    steps: list[Step] = []

    def watch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        tensors = [x for x in args if isinstance(x, Tensor)]
        words = " ".join(f"{name}={value}" for name, value in options.items())
        before = [digest(x) for x in tensors]
        launch(kernel, grid, *args, **options)
        steps.append(Step(f"{kernel.fn.__name__} {words}", before, [digest(x) for x in tensors]))

    with in_place_of_launch(watch) as launch:
        results = problem.results(problem.inputs(0, device), "triton")
    return Dump(steps, {name: value.cpu() for name, value in results.items()})


def differences(problem: Problem, first: Dump, second: Dump) -> tuple[list[str], list[str]]:
    """What differs between two dumps, a line each; and of these the lines of what is wrong."""
    told, wrong = [], []
    if [step.kernel for step in first.steps] != [step.kernel for step in second.steps]:
        wrong.append(f"{problem}: the launches are not the same")
    for one, other in zip(first.steps, second.steps, strict=False):
        if one.before == other.before and one.after != other.after:
            places = [i for i, (a, b) in enumerate(zip(one.after, other.after, strict=True)) if a != b]
            told.append(f"{problem}: {one.kernel}: other bits in tensors {places}")
    for name, value in first.results.items():
        off = relative(second.results[name], value.double())
        if not off <= 2 * BOUND[problem.dtype]:
            wrong.append(f"{problem}: {name} differs by {off:.2g}")
        elif off:
            told.append(f"{problem}: {name} differs by {off:.2g}, which is rounding")
    return [*wrong, *told], wrong


def assemblers() -> dict[str, Path]:
    """Both programs, by name, if this is a Hopper and has them; else none."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = {name: folder / name for name in NAMES}
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == HOPPER
    return found if hopper and all(path.exists() for path in found.values()) else {}


def settings(name: str, path: Path) -> dict[str, str]:
    """The environment in which Triton uses this ptxas. The bundled one has the cache of whatever else has run."""
    cache = os.environ.get("TRITON_CACHE_DIR", str(CACHE)) + ("" if name == BUNDLED else f"-{name}")
    return {**plain(), "TRITON_PTXAS_PATH": str(path), "TRITON_CACHE_DIR": cache}


def plain() -> dict[str, str]:
    """The environment in which Triton uses what it will."""
    return {**os.environ, "TRITON_INTERPRET": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def dump_all(folder: Path, name: str, path: Path) -> list[Dump]:
    """Every problem, each in a process of its own, for most of the time goes into compiling."""
    files = [folder / f"{name}-{i}.pt" for i in range(len(problems()))]
    command = [sys.executable, "-m", "tests.gpu.ptxas", str(folder), "--dump"]
    environment = settings(name, path)
    running = [
        subprocess.Popen([*command, str(file), str(i)], cwd=ROOT, env=environment) for i, file in enumerate(files)
    ]
    codes = [process.wait() for process in running]
    assert not any(codes), f"{name}: problems {[i for i, code in enumerate(codes) if code]} could not be run"
    dumps = [Dump(*torch.load(file, weights_only=False)) for file in files]
    for file in files:
        file.unlink()  # megabytes
    return dumps


def compare_kernels(folder: Path, found: dict[str, Path]) -> bool:
    """Write what differs into report.md, and return True if nothing is wrong."""
    first, second = (dump_all(folder, name, path) for name, path in found.items())
    told, wrong = [], []
    for problem, one, other in zip(problems(), first, second, strict=True):
        lines, bad = differences(problem, one, other)
        told, wrong = told + lines, wrong + bad
    launches = sum(len(dump.steps) for dump in first)
    words = f"{launches} launches by {' and '.join(NAMES)}: {len(told)} differences, {len(wrong)} more than rounding"
    (folder / "report.md").write_text("\n".join([words, "", *(f"- {line}" for line in told)]) + "\n")
    print(*told, words, sep="\n")
    return not wrong


def run_tests(folder: Path, environment: dict[str, str], name: str, arguments: Sequence[str]) -> dict[str, str]:
    """test_device.py in this environment: of every test whether it passed, failed or was skipped."""
    report = folder / f"tests-{name}.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_device.py", f"--junitxml={report}", "--durations", "10"]
    spread = ["--numprocesses=8"] if importlib.util.find_spec("xdist") else []
    report.unlink(missing_ok=True)
    subprocess.run([*command, *spread, *arguments], cwd=ROOT, env=environment)
    return read_tests(report)


def read_tests(report: Path) -> dict[str, str]:
    if not report.exists():
        return {"pytest": "failed"}
    found = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[case.get("name", "")] = outcome
    return found or {"no test": "failed"}


def compare_tests(outcomes: dict[str, dict[str, str]]) -> bool:
    """Say which tests fail, and which do so with one ptxas only; returns True if none fails."""
    failed = {name: {test for test, how in tests.items() if how == "failed"} for name, tests in outcomes.items()}
    for name, tests in failed.items():
        print(*sorted(tests), f"{name}: {len(outcomes[name])} tests, {len(tests)} failed", sep="\n")
    if len(failed) == 2:
        alone = set.symmetric_difference(*failed.values())
        print(
            "which tests fail depends on ptxas:" if alone else "the same tests pass by both", *sorted(alone), sep="\n  "
        )
    return not any(failed.values())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.ptxas", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dump", nargs=2, metavar=("FILE", "PROBLEM"), help="run one problem, and write it down")
    parser.add_argument("--once", action="store_true", help="by the ptxas that Triton takes, and no other")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help="run test_device.py too, with these arguments")
    chosen = parser.parse_args(arguments)
    if chosen.dump is not None:
        torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is filled, so that digests are equal
        print(allow_any_triton())
        file, number = chosen.dump
        torch.save(tuple(run_problem(problems()[int(number)], default_device())), file)
        return 0
    chosen.folder.mkdir(parents=True, exist_ok=True)
    found, right = assemblers(), True
    if chosen.tests is not None:
        each = {name: settings(name, path) for name, path in found.items()}
        each = {BUNDLED: plain()} if chosen.once or not each else each
        outcomes = {name: run_tests(chosen.folder, env, name, chosen.tests) for name, env in each.items()}
        right = compare_tests(outcomes)
        if all(how == "skipped" for tests in outcomes.values() for how in tests.values()):
            print("needs CUDA")
            return LACKING
        if chosen.once:
            return int(not right)
    if not found:
        print("needs a Hopper, and a Triton with ptxas-blackwell, to compare two ptxas")
        return LACKING if chosen.tests is None else int(not right)
    if not chosen.tests:  # of a part of the tests one wants the outcome alone
        right = compare_kernels(chosen.folder, found) and right
    return int(not right)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
