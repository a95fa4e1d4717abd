"""Reading run folders: what a record holds, and that whatever cannot be used is named with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from analysis import report
from analysis.runs import differing_keys, read_folder, read_run
from tests.analysis.fabricated import COMMIT, UNIGRAM, write_run, write_sweep


def edit(file: Path, **values: Any) -> None:
    record = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (record | values).items() if value is not None}))


def test_a_run_is_read_into_one_record(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "one", linear="gla", ratio="1/8", seed=3, bits=2.5, steps=20))
    assert (run.name, run.linear, run.softmax, run.seed) == ("one", "gla", Fraction(1, 8), 3)
    assert (run.steps, run.tokens, run.parameters) == (20, 20480, 900_000)
    assert run.bits_per_byte == 2.5
    assert run.below_unigram == pytest.approx(1 - 2.5 / UNIGRAM)
    assert [point.step for point in run.train] == list(range(1, 21))
    assert [(point.step, point.tokens) for point in run.validation] == [(10, 10240), (20, 20480)]
    assert run.validation[-1].bits_per_byte == 2.5
    assert run.provenance["commit"] == COMMIT
    assert not run.modified


@pytest.mark.parametrize(
    ("pattern", "letters", "kind"),
    [
        (None, "LLLN", "gla"),
        ("LLLN", "LLLN", "gla"),
        (None, "NNNN", None),
        (["retention", "softmax", "gla", "softmax"], "LNLN", "retention+gla"),
        (["retention", "softmax"], "LNLN", "retention"),
    ],
)
def test_the_kind_of_linear_blocks(tmp_path: Path, pattern: Any, letters: str, kind: str | None) -> None:
    folder = write_run(tmp_path / "one", changes={"model.pattern": pattern})
    edit(folder / "summary.json", pattern=letters)
    assert read_run(folder).linear == kind


@pytest.mark.parametrize(("patch", "untracked"), [("diff --git", []), ("", ["layers/new.py"])])
def test_code_that_differs_from_its_commit_is_known(tmp_path: Path, patch: str, untracked: list[str]) -> None:
    folder = write_run(tmp_path / "one")
    (folder / "diff.patch").write_text(patch)
    edit(folder / "provenance.json", untracked=untracked)
    assert read_run(folder).modified
    (folder / "diff.patch").write_text("")
    edit(folder / "provenance.json", untracked=["notes.txt"])
    assert not read_run(folder).modified


def test_a_step_that_was_repeated_after_a_resume_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", steps=20)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    repeated = json.dumps(json.loads(lines[4]) | {"loss": 9.0})
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:6], repeated, *lines[5:]]) + "\n")
    run = read_run(folder)
    assert [point.step for point in run.train] == list(range(1, 21))
    assert run.train[4].loss == 9.0


def test_the_format_of_a_recipe_is_no_key_of_it(tmp_path: Path) -> None:
    """Runs that name theirs lie beside runs that are too old to name one."""
    folder = write_run(tmp_path / "one")
    older = read_run(folder)
    (folder / "recipe.yaml").write_text("format: 1\n" + (folder / "recipe.yaml").read_text())
    assert read_run(folder).recipe == older.recipe


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def tear_metrics(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text()[:-30])


def write(name: str, text: str | bytes) -> Callable[[Path], None]:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(content) and None  # type: ignore[func-returns-value]


def cut_recipe(folder: Path) -> None:
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text[: text.index("optim:") + 6])


# Each file of a run empty, of another kind, of bytes that are no text, and torn.
DAMAGE = [
    (write(name, content), f"half-written: {name}")
    for name in ("summary.json", "provenance.json", "recipe.yaml")
    for content in ("", "[1, 2]", "null", "7", b"\xff\xfe\x00", "{", '{"a": ')
]

FAULTS: list[tuple[Callable[[Path], None], str]] = [
    *DAMAGE,
    (write("metrics.jsonl", b"\xff\xfe\n"), "half-written: line 1 of metrics.jsonl"),
    (write("metrics.jsonl", "[1]\n"), "half-written: line 1 of metrics.jsonl"),
    (write("metrics.jsonl", '{"step": "x"}\n'), "half-written: line 1 of metrics.jsonl"),
    (write("recipe.yaml", "a: [1\nb: {"), "half-written: recipe.yaml cannot be read"),
    (write("recipe.yaml", "format: 2\nname: a"), "recipe.yaml is of format '2', and this version reads format 1; read"),
    (cut_recipe, "half-written: recipe.yaml lacks optim, parallel, checkpoint, wandb"),
    (lambda folder: edit(folder / "summary.json", pattern=""), "recipe.yaml or summary.json cannot be used"),
    (lambda folder: edit(folder / "summary.json", steps="many"), "recipe.yaml or summary.json cannot be used"),
    (lambda folder: edit(folder / "summary.json", seconds=[]), "recipe.yaml or summary.json cannot be used"),
    (lambda folder: edit(folder / "provenance.json", corpus=[]), "provenance.json lacks corpus.fingerprint"),
    (lambda folder: edit(folder / "provenance.json", versions="new"), "provenance.json lacks versions.torch"),
    (lambda folder: edit(folder / "provenance.json", dp="two"), "provenance.json lacks dp"),
    (remove("summary.json"), "unfinished: there is no summary.json, and the last step in metrics.jsonl is 60"),
    (lambda folder: edit(folder / "summary.json", status="failed"), "failed: summary.json says so after 60 steps"),
    (lambda folder: edit(folder / "summary.json", status="stopped"), "stopped"),
    (lambda folder: edit(folder / "summary.json", pattern=None), "lacks 'pattern'"),
    (lambda folder: (folder / "summary.json").write_text('{"status": '), "half-written: summary.json"),
    (remove("recipe.yaml"), "half-written: recipe.yaml"),
    (remove("provenance.json"), "half-written: provenance.json"),
    (lambda folder: edit(folder / "provenance.json", corpus=None), "half-written: provenance.json lacks corpus"),
    (remove("metrics.jsonl"), "half-written: there is no metrics.jsonl"),
    (tear_metrics, "half-written: line 66 of metrics.jsonl"),
    (lambda folder: (folder / "metrics.jsonl").write_text(""), "half-written: metrics.jsonl holds no training step"),
    (lambda folder: edit(folder / "summary.json", validation_loss=1.0), "contradiction: 1.0 nats per byte"),
    (
        lambda folder: edit(folder / "summary.json", validation_loss=1.3862943611198906, bits_per_byte=2.0),
        "contradiction: summary.json says 2.0 bits per byte, metrics.jsonl ends with 2.5",
    ),
]


@pytest.mark.parametrize(("damage", "reason"), FAULTS, ids=[reason for _, reason in FAULTS])
def test_a_run_that_cannot_be_used_says_why(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    write_run(tmp_path / "good")
    damage(write_run(tmp_path / "bad"))
    folder = read_folder(tmp_path)
    assert [run.name for run in folder.runs] == ["good"]
    assert [fault.name for fault in folder.faults] == ["bad"]
    assert reason in folder.faults[0].reason
    assert len(folder.faults[0].reason.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"cells": 3}', b'{"cells": [3]}', b'{"cells": []}', b"\xff"])
def test_a_plan_that_cannot_be_read_is_a_fault_and_the_runs_are_reported(tmp_path: Path, content: bytes) -> None:
    write_run(tmp_path / "good")
    (tmp_path / "sweep.json").write_bytes(content)
    folder = read_folder(tmp_path)
    assert [run.name for run in folder.runs] == ["good"] and folder.plan is None
    assert [fault.name for fault in folder.faults] == ["sweep.json"]
    assert folder.faults[0].reason.startswith("half-written: sweep.json")


def test_a_report_goes_on_beside_broken_runs_and_a_broken_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "good", steps=10)
    (tmp_path / "sweep.json").write_text("{")
    for number, (damage, _) in enumerate(some := FAULTS[::5]):
        damage(write_run(tmp_path / f"bad-{number}"))
    assert report.main([str(tmp_path)]) == 1
    text, said = (tmp_path / "report/loss.md").read_text(), capsys.readouterr().err
    for number, (_, reason) in enumerate(some):
        assert f"- bad-{number}: " in text and reason in text and f"warning: bad-{number}: " in said
    assert "- sweep.json: half-written" in text and "| gla" in text


def test_runs_that_were_moved_aside_are_no_runs_of_the_folder(tmp_path: Path) -> None:
    """With a plan and without."""
    for name in ("one", "one.old-1", "one.old-12"):
        write_run(tmp_path / name, steps=10)
    found = read_folder(tmp_path)
    assert [run.name for run in found.runs] == ["one"] and found.faults == ()
    plan = {"name": "trial", "command": "python -m recipes.sweep", "cells": [{"name": "one"}]}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    found = read_folder(tmp_path)
    assert [run.name for run in found.runs] == ["one"] and found.faults == ()


def test_the_plan_names_runs_that_are_missing_or_strange(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "trial")
    for file in (folder / "ratio-1").iterdir():
        file.unlink()
    write_run(folder / "older")
    (folder / "report").mkdir()
    found = read_folder(folder)
    assert len(found.runs) == 10
    assert {fault.name: fault.reason.split(":")[0] for fault in found.faults} == {
        "ratio-1": "missing",
        "older": "not of this sweep",
    }


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished run .*no run folders at all.*python -m recipes.sweep"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        read_folder(tmp_path / "nowhere")
    (write_run(tmp_path / "one") / "summary.json").unlink()
    with pytest.raises(ValueError, match="no finished run .*one: unfinished"):
        read_folder(tmp_path)


def test_differing_keys_leave_out_what_the_report_compares(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a", linear="gla", ratio="0")),
        read_run(
            write_run(tmp_path / "b", linear="lightning", ratio="1", seed=4, changes={"model.mixers": {"gla": {}}})
        ),
    ]
    assert differing_keys(runs) == []
    runs.append(read_run(write_run(tmp_path / "c", changes={"optim.lr": 0.5, "data.length": 64})))
    assert differing_keys(runs) == ["data.length", "optim.lr"]
