"""``make mutants``: break the source in every way of catalogue.py, and see the named test fail.

Each mutant is applied to a copy of the tree, on which every test must pass before. Only the first outcome is good:

    killed    its test failed in time
    survived  its test passed: the tests have a hole
    late      its test had not finished
    broken    its test could not be run
    stale     the quoted source is gone, or stands there more than once

ARGS="sign zigzag" runs the mutants whose names hold one of the words.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.catalogue import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0


def run_tests(tree: Path, tests: Sequence[str], deadline: float) -> tuple[int | None, str]:
    """Exit code of pytest (0 passed, 1 failed, None out of time) and its output. Bytecode would hide a change."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    process = subprocess.Popen(command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=deadline)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.kill()  # its ranks notice and leave
        return None, process.communicate()[0]


def judge(mutant: Mutant, tree: Path, deadline: float = DEADLINE) -> tuple[str, str]:
    """What became of the mutant, and the line that says how."""
    path = tree / mutant.file
    source = path.read_text() if path.exists() else ""
    if source.count(mutant.old) != 1:
        return "stale", f"{mutant.file} holds the old text {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        code, output = run_tests(tree, [mutant.test], deadline)
    finally:
        path.write_text(source)
    words = {0: "survived", 1: "killed", None: "late"}
    said = [line.removeprefix("E ").strip() for line in output.splitlines() if line.startswith("E ")]
    return words.get(code, "broken"), (said or output.splitlines()[-1:] or [""])[0]


def main(words: Sequence[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if not chosen:
        print("No mutant has such a name. There are:", *(m.name for m in MUTANTS), sep="\n    ")
        return 1
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        skip = shutil.ignore_patterns(
            ".git", ".venv", "runs", "wandb", "shared", "__pycache__", ".*_cache", "*.egg-info"
        )
        shutil.copytree(ROOT, tree, ignore=skip)
        code, output = run_tests(tree, sorted({m.test for m in chosen}), deadline=600.0)
        if code != 0:
            print(f"{output}\nThe tests must pass before the source is broken.")
            return 1
        killed = 0
        for mutant in chosen:
            start = time.monotonic()
            outcome, line = judge(mutant, tree)
            killed += outcome == "killed"
            print(f"{outcome:8}  {time.monotonic() - start:4.0f} s  {mutant.name}: {line[:150]}", flush=True)
    print(f"{killed} of {len(chosen)} mutants killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
