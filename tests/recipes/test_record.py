"""What a run tells and keeps when something is in its way: another training, broken files, no room, no reader."""

from __future__ import annotations

import io
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes import config, lock, provenance, record
from recipes.record import Record, TrainingStopped, read_metrics
from tests.recipes.conftest import Train

RECIPE = config.Recipe(wandb=config.WandbConfig(mode="disabled"))
ANEW = replace(RECIPE, checkpoint=config.CheckpointConfig(resume="never"))
FACTS = {"corpus": {"fingerprint": "0" * 64}}
ENDED = {"steps": 1, "seconds": 1.0}
LINE = {"step": 1, "loss": 1.0, "tokens": 8}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No questions to git, and no pictures."""
    monkeypatch.setattr(provenance, "git", lambda *_: None)
    monkeypatch.setattr(record, "draw_loss", lambda *_: None)


def prepared(folder: Path, recipe: config.Recipe = RECIPE) -> Record:
    one = Record(folder, recipe)
    one.prepare(FACTS)
    return one


def begun(folder: Path) -> Record:
    one = prepared(folder)
    one.begin(step=0)
    return one


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.name.endswith(".lock")}


# Two trainings, one folder


@pytest.mark.parametrize("name", ["conc", "sweep/cell"])
def test_the_lock_comes_first_and_outlives_the_rename_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    first = prepared(folder)
    (folder / "checkpoints" / ".saving-step-00000900").mkdir(parents=True)
    for alive in ("the first", "the second, which moved the first aside"):
        before = tree(tmp_path)
        for recipe in (ANEW, RECIPE):
            with pytest.raises(config.RecipeError, match=rf"another process is training in {folder} \(process \d+\)"):
                prepared(folder, recipe)
        assert tree(tmp_path) == before, alive
        if alive == "the first":
            del first  # as if its process had ended
            second = prepared(folder, ANEW)
            assert folder.with_name(f"{folder.name}.old-1").exists() and not (folder / "checkpoints").exists()
    del second
    prepared(folder, ANEW)
    assert folder.with_name(f"{folder.name}.old-2").exists()


def test_what_came_into_the_folder_before_the_lock_was_taken_is_seen(tmp_path: Path) -> None:
    """Between the first look, which needs no lock, and the lock, another run may come and go."""
    seed_5 = replace(RECIPE, train=config.TrainConfig(seed=5))
    record.check_same_run(tmp_path / "run", seed_5, FACTS["corpus"]["fingerprint"])
    prepared(tmp_path / "run")
    with pytest.raises(config.RecipeError, match=r"another recipe: train\.seed \(0 -> 5\)"):
        prepared(tmp_path / "run", seed_5)


def test_a_lock_file_that_nobody_holds_says_nothing(tmp_path: Path) -> None:
    lock.hold(tmp_path / "run").close()
    assert (tmp_path / ".run.lock").exists()
    prepared(tmp_path / "run")


# Files as they are found


BROKEN = {
    "provenance.json": ["", "{", "[]", "{}", "7", "\xff"],
    "recipe.yaml": ["", "model: [", "- 7", "\xff", None],
    "summary.json": ["", "{", "[]", "{}", "7", "\xff"],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    prepared(tmp_path)
    for content in BROKEN[name]:
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_text(content, encoding="latin-1")
        with pytest.raises(config.RecipeError) as caught:
            if name == "summary.json":
                record.finished(tmp_path, RECIPE)
            record.check_same_run(tmp_path, RECIPE, FACTS["corpus"]["fingerprint"])
        advice = "delete it, and the same command goes on" if name == "summary.json" else "add name=ANOTHER_NAME"
        said = str(caught.value)
        assert said.startswith(f"{tmp_path / name} cannot be read: ") and advice in said and "\n" not in said, said


def test_a_finished_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    begun(tmp_path).finish("stopped", ENDED)
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished", **ENDED}))
    with pytest.raises(config.RecipeError, match="checkpoints/latest is missing, and its weights with it; add name="):
        record.finished(tmp_path, RECIPE)


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        act = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, act=act: (done.append(name), act(*args)))
    prepared(tmp_path / "run")
    assert done == ["fsync", "replace"] * 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(config.RecipeError, match=r"file/run cannot be written: .*File exists.*out=ANOTHER_FOLDER"):
        prepared(tmp_path / "file" / "run")
    one = prepared(tmp_path / "run")
    (tmp_path / "run" / ".metrics.jsonl").mkdir()
    with pytest.raises(config.RecipeError, match=r"run cannot be written: .*Is a directory"):
        one.begin(step=0)


# Nobody reads, and no room


@contextmanager
def stream(kind: str) -> Iterator[io.TextIOWrapper]:
    if kind == "ascii":
        yield io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    else:
        reading, writing = os.pipe()
        os.close(reading)
        with open("/dev/full", "w") if kind == "full" else os.fdopen(writing, "w") as file:
            yield file


@pytest.mark.parametrize("kind", ["ascii", "gone", "full"])
def test_a_stream_that_takes_no_words_ends_nothing(kind: str) -> None:
    with stream(kind) as out:
        record.say("caf\u00e9", out)
        record.say("again", out)
        if kind == "ascii":
            assert out.buffer.getvalue() == b"caf\\xe9\nagain\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", ["nobody reads", "terminal is ASCII"])
def test_a_training_outlives_its_terminal(fault: str, train: Train, tmp_path: Path) -> None:
    done = train("train.steps=2", "train.sample=60", fault=fault)
    assert done.ok and "error" not in done.texts[0] and "WARNING" not in done.texts[0], done
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert len((tmp_path / "run" / "sample.txt").read_text(encoding="utf-8")) > 10
    assert ("finished   2 steps" in done.texts[0]) == (fault == "terminal is ASCII")


def test_no_half_of_a_line_is_left_in_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A write that stops in the middle, here at the limit of a file's size."""
    one = begun(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    one.validation({**LINE, "bits_per_byte": 1.0, "unigram_bits_per_byte": 2.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 10, limits[1]))
    try:
        one._write({"kind": "train", **LINE})
        one._write({"kind": "train", **LINE, "step": 2})
        with pytest.raises(OSError, match="No space left on device"):
            one.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1 and "metrics stay in memory" in said
    assert len(metrics.read_text().splitlines()) == 1 and metrics.read_text().endswith("}\n")
    one._write({"kind": "train", **LINE, "step": 3})
    assert [line["step"] for line in read_metrics(metrics)] == [1, 1, 2, 3]


def test_metrics_that_had_no_room_once_are_written_later(train: Train, tmp_path: Path) -> None:
    done = train(fault="metrics have no room once", nth=3)
    assert done.ok and done.texts[0].count("No space left on device") == 1, done
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 9))


def test_no_room_for_metrics_stops_every_rank_with_the_cause(train: Train, tmp_path: Path) -> None:
    """Before the checkpoint that would leave a gap in the metrics."""
    done = train(ranks=2, fault="metrics have no room", nth=4)
    assert done.codes == [1, 1] and done.texts[1] == "", done
    *_, warning, validation, error = done.texts[0].splitlines()
    assert warning.startswith("WARNING    [Errno 28] No space left on device") and "validation" in validation, done
    assert error.startswith("error: step 4: [Errno 28] No space left on device. Stopped on all ranks;"), done
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000002\n"
    assert train(ranks=2).ok
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 9))


def test_what_is_finished_is_not_called_failed(train: Train, tmp_path: Path) -> None:
    done = train("train.steps=2", ranks=2, fault="summary has no room", nth=1)
    assert done.codes == [1, 1] and done.texts[1] == "", done
    last = done.texts[0].splitlines()[-1]
    assert last.startswith("error: the training has finished and is saved, but summary.json is not written: "), done
    assert "No space left on device" in last and "start the same command again" in last, done
    assert not (tmp_path / "run" / "summary.json").exists()
    again = train("train.steps=2", ranks=2)
    assert again.ok and "finished   2 steps" in again.texts[0], again


# Failures beside a failure, and beside a success


class BrokenTracker:
    def finish(self, summary: dict[str, Any]) -> None:
        raise ConnectionError("the service is gone")

    log = finish


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """A run whose picture, sample and tracker fail."""

    def fail(*args: Any) -> None:
        raise AttributeError("'_idat' object has no attribute 'fileno'")

    one = begun(tmp_path)
    monkeypatch.setattr(record, "draw_loss", fail)
    monkeypatch.setattr(one, "_tracker", BrokenTracker())
    return one


def test_the_cause_of_a_failure_comes_first_and_once(broken: Record, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    broken.fail(ENDED, "step 3: the cause")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0] == "error: step 3: the cause" and err.count("the cause") == 1
    assert [line.split()[:2] for line in lines[1:]] == [["WARNING", "loss.png"], ["WARNING", "wandb"]]
    summary = record.read_summary(broken.folder)
    assert (summary["status"], summary["error"]) == ("failed", "step 3: the cause")


def test_a_failure_that_cannot_be_written_is_still_said(
    broken: Record, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    broken.fail(ENDED, "the cause")
    assert capsys.readouterr().err.splitlines()[0] == "error: the cause"
    with pytest.raises(TrainingStopped, match="the training has stopped and is saved"):
        broken.finish("stopped", ENDED)


def test_what_is_beside_a_training_does_not_fail_it(broken: Record, capsys: pytest.CaptureFixture[str]) -> None:
    def sample() -> str:
        raise ValueError("probabilities are not finite")

    (broken.folder / "checkpoints").mkdir()
    (broken.folder / "checkpoints" / "latest").write_text("step-00000001\n")
    assert broken.finish("finished", ENDED, sample)["status"] == "finished"
    out, err = capsys.readouterr()
    assert "finished   1 steps" in out and record.read_summary(broken.folder)["status"] == "finished"
    assert [line.split()[1] for line in err.splitlines()] == ["loss.png", "sample.txt", "wandb"]


def test_training_goes_on_without_a_tracker_that_dies(broken: Record, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        broken._write({"kind": "train", **LINE, "step": step})
    assert capsys.readouterr().err.count("WARNING    wandb has ended") == 1
    assert len(read_metrics(broken.folder / "metrics.jsonl")) == 2


def test_bytes_that_are_all_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their entropy is 0, of which nothing is a share."""
    one = begun(tmp_path)
    one.validation({**LINE, "bits_per_byte": 0.25, "unigram_bits_per_byte": 0.0})
    assert one.finish("stopped", ENDED)["below_unigram"] is None
    assert capsys.readouterr().out.count("validation 0.250 bits/byte, of bytes that are all equal") == 2
