"""The first tier, what `make test` runs, covers every law: no promise and no mutant rests on a test marked slow."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.catalogue import MUTANTS

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("tests/**/test_*.py")]


@pytest.fixture(scope="module")
def first_tier(request: pytest.FixtureRequest) -> set[str]:
    """Every test that `make test` runs, by its id, and by its id without parameters; collected anew unless this session
    has collected the whole suite."""
    ids = {item.nodeid for item in request.session.items if item.get_closest_marker("slow") is None}
    if not {test.partition("::")[0] for test in ids} >= {str(path.relative_to(ROOT)) for path in FILES}:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, "tests"], cwd=ROOT, capture_output=True, text=True, check=True)
        ids = {line for line in done.stdout.splitlines() if "::" in line}
    return ids | {one.partition("[")[0] for one in ids}


def promises() -> dict[str, list[str]]:
    """The rows of the README's table of promises, with the tests that they name."""
    _, _, section = (ROOT / "README.md").read_text().partition("\n## What is promised")
    table = section.partition("\n\n|")[2].partition("\n\n")[0]
    return {row: re.findall(r"`([\w/]+\.py::\w+)`", row) for row in table.splitlines()[2:]}


def test_every_promise_names_tests_of_the_first_tier(first_tier: set[str]) -> None:
    assert len(promises()) >= 20
    for row, tests in promises().items():
        assert tests, f"this row names no test: {row}"
        assert not {f"tests/{test}" for test in tests} - first_tier, f"not of the first tier: {row}"


def test_every_mutant_is_killed_by_a_test_of_the_first_tier(first_tier: set[str]) -> None:
    assert not [f"{mutant.name}: {mutant.test}" for mutant in MUTANTS if mutant.test not in first_tier]
