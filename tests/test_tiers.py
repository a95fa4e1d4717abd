"""The first tier, what `make test` runs, covers every law: no promise and no mutant rests on a test marked slow."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.catalogue import MUTANTS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def first_tier(request: pytest.FixtureRequest) -> set[str]:
    """Tests that `make test` runs, by their ids, and by their ids without parameters: those of this session, or all if
    a test that is asked for is not among them."""
    here = {item.nodeid for item in request.session.items if item.get_closest_marker("slow") is None}
    asked = {mutant.test for mutant in MUTANTS}.union(*promises().values())
    if asked <= with_short_ids(here):
        return with_short_ids(here)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests"], cwd=ROOT, capture_output=True, text=True, check=True)
    return with_short_ids({line for line in done.stdout.splitlines() if "::" in line})


def with_short_ids(ids: set[str]) -> set[str]:
    return ids | {one.partition("[")[0] for one in ids}


def promises() -> dict[str, list[str]]:
    """The rows of the engine page's table of promises, with the tests that they name."""
    _, _, section = (ROOT / "hybrid_sp/README.md").read_text().partition("\n## What is promised")
    table = section.partition("\n\n|")[2].partition("\n\n")[0]
    return {
        row: [f"tests/{test}" for test in re.findall(r"`([\w/]+\.py::\w+)`", row)] for row in table.splitlines()[2:]
    }


def test_every_promise_names_tests_of_the_first_tier(first_tier: set[str]) -> None:
    assert len(promises()) >= 20
    for row, tests in promises().items():
        assert tests, f"this row names no test: {row}"
        assert not set(tests) - first_tier, f"not of the first tier: {row}"


def test_every_mutant_is_killed_by_a_test_of_the_first_tier(first_tier: set[str]) -> None:
    assert not [f"{mutant.name}: {mutant.test}" for mutant in MUTANTS if mutant.test not in first_tier]
