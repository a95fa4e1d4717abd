"""Programs beside this file that compare us with a package, each in an interpreter of its own.

Importing such a package takes seconds and patches what it finds, so no test and no rank process does it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

Errors = dict[str, dict[str, float]]  # of every comparison: the relative error of every tensor


def errors_of(name: str, *arguments: str) -> Errors:
    """What the program tests/external/NAME.py reports."""
    run = subprocess.run(
        [sys.executable, "-m", f"tests.external.{name}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def report(errors: Errors) -> None:
    """The program's side: its last line of output."""
    print(json.dumps(errors))
