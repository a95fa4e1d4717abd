"""The mutants themselves: each quotes the source as it is, and the runner tells the outcomes apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.catalogue import MUTANTS, Mutant
from tests.mutants.run import ROOT, judge


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_quotes_the_source_and_names_a_test(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, f"{mutant.name} is stale: move its quote along"
    file, name = mutant.test.split("[")[0].split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


def test_there_are_enough_and_no_two_alike() -> None:
    assert len(MUTANTS) >= 12
    assert len({mutant.name for mutant in MUTANTS}) == len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        ("a + b", "a - b", "killed"),
        ("a + b", "b + a", "survived"),
        ("a + b", "a +", "broken"),
        ("a * b", "a - b", "stale"),
        ("return", "import time; time.sleep(600); return", "late"),
    ],
)
def test_outcomes(tmp_path: Path, old: str, new: str, outcome: str) -> None:
    source = "def add(a, b):\n    return a + b\n"
    (tmp_path / "adding.py").write_text(source)
    (tmp_path / "test_adding.py").write_text("import adding\ndef test_add():\n    assert adding.add(1, 2) == 3\n")
    mutant = Mutant(name="m", file="adding.py", old=old, new=new, test="test_adding.py::test_add")
    assert judge(mutant, tmp_path, deadline=0.5 if outcome == "late" else 300.0)[0] == outcome
    assert (tmp_path / "adding.py").read_text() == source
