"""The table of launch parameters: what is in it, what replaces it, and that it depends on nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from hybrid_sp.kernels.gpu import tuning  # noqa: E402

CPU = torch.device("cpu")
HERE = tuning.key("scan", 128, 128, torch.bfloat16, ("computed", "scalar", "writing"))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty table of this test alone."""
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    monkeypatch.setattr(tuning, "TABLE", path)
    tuning.measured.cache_clear()
    return path


@pytest.fixture(autouse=True)
def read_again() -> Iterator[None]:
    yield
    tuning.measured.cache_clear()


def asked(kind: tuple[str, ...] = ("computed", "scalar", "writing"), width: int = 128) -> tuning.Entry:
    return tuning.entry("scan", width, 128, torch.bfloat16, CPU, kind)


def test_what_is_written_is_used_for_its_key_and_architecture_alone(table: Path) -> None:
    default = asked()
    measured = default._replace(columns=32, warps=4, stages=5)
    tuning.write("sm_90", {HERE: measured})
    assert asked() == default
    tuning.write(tuning.INTERPRETER, {HERE: measured})
    assert asked() == measured
    assert asked(width=64).stages != 5 and asked(("computed", "none", "writing")).stages != 5
    assert set(json.loads(table.read_text())) == {"sm_90", tuning.INTERPRETER}


def test_a_later_measurement_replaces_an_entry_and_keeps_the_others(table: Path) -> None:
    one, two = asked(), asked()._replace(warps=2)
    tuning.write(tuning.INTERPRETER, {HERE: one, "fold scalar 8x8 float32": one})
    tuning.write(tuning.INTERPRETER, {HERE: two})
    assert tuning.measured()[tuning.INTERPRETER] == {HERE: two, "fold scalar 8x8 float32": one}


def test_a_trial_ends_with_its_context(table: Path) -> None:
    default, other = asked(), asked()._replace(warps=2)
    with tuning.watching() as seen, tuning.trying({HERE: other}):
        assert asked() == other
    assert asked() == default and seen == {HERE: other}


def test_the_committed_table_can_be_read() -> None:
    for entries in tuning.measured().values():
        for key, entry in entries.items():
            assert key.split()[0] in tuning.ROLES and entry != tuning.Entry()


@pytest.mark.parametrize("role", tuning.ROLES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_five_candidates_at_most_of_which_the_first_is_the_default(role: str, dtype: torch.dtype) -> None:
    for width in (1, 64, 128, 256):
        default = tuning.entry(role, width, width, dtype, CPU)
        tried = tuning.candidates(tuning.key(role, width, width, dtype), default)
        assert tried[0] == default and 1 < len(set(tried)) == len(tried) <= 5
        assert all(one.rows == default.rows for one in tried) or role == "summary"
