"""wandb: a run that was started several times is one curve, and what wandb lacks is said before anything is built."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes import config, tracker
from recipes.record import read_metrics
from tests.recipes.conftest import Train

NOT_READ = "data.files=/nowhere/*.txt"  # whoever reads the data first complains about this


def history(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of the one ``.wandb`` file in a folder: after 7 bytes of its own, records as LevelDB logs them."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    content, at, record = path.read_bytes(), 7, b""
    while len(content) - at >= 7:
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)  # after a checksum of 4 bytes
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            read, record = wandb_internal_pb2.Record.FromString(record), b""
            if read.WhichOneof("record_type") == "history":
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in read.history.item}


def pieces(run: Path) -> list[list[dict[str, Any]]]:
    """The rows of each start, in the order of the starts."""
    wandb_id = json.loads((run / "provenance.json").read_text())["wandb_id"]
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert all(folder.name.endswith(f"-{wandb_id}") for folder in folders), folders
    return [list(history(folder)) for folder in folders]


def test_pieces_of_a_resumed_run_are_one_curve_over_its_steps(train: Train, tmp_path: Path) -> None:
    """A run that fails in step 4, after the checkpoint of step 2, and goes on from there."""
    assert train("wandb.mode=offline", fault="loss is nan", nth=4).codes == [1]
    assert train("wandb.mode=offline").ok
    first, second = pieces(tmp_path / "run")
    assert [row["_step"] for row in first] == [1, 2, 3] and [row["_step"] for row in second] == list(range(3, 9))
    assert first[-1]["train/loss"] == second[0]["train/loss"], "a step that is taken again falls on itself"
    curve = {row["_step"]: row for row in first + second}
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        row = curve[line["step"]]
        assert row["step"] == line["step"] and row[f"{line['kind']}/loss"] == line["loss"]


@pytest.mark.parametrize(
    ("overrides", "fault", "reason"),
    [
        (["wandb.mode=online"], "wandb has no key", "No API key configured"),
        (["wandb.mode=offline"], "wandb is not installed", "wandb"),
    ],
    ids=["key", "package"],
)
def test_what_wandb_lacks_is_said_before_anything_is_built(
    train: Train, tmp_path: Path, overrides: list[str], fault: str, reason: str
) -> None:
    done = train(*overrides, NOT_READ, fault=fault)
    (line,) = done.texts[0].splitlines()
    assert done.codes == [2] and line.startswith(f"error: {overrides[0]}, wandb.project=") and reason in line, done
    assert "wandb.mode=disabled" in line and list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def login(verify: bool) -> None:
        asked.append(verify)
        raise ConnectionError("Failed to authenticate with http://127.0.0.1:9: refused\nmore\n")

    nothing = SimpleNamespace(Settings=lambda **_: None, setup=lambda _: None, login=login)
    monkeypatch.setitem(sys.modules, "wandb", nothing)
    with pytest.raises(config.RecipeError, match=r"^wandb\.mode=online, .*: refused; mend it, or set wandb\.mode=off"):
        tracker.check(config.Recipe(wandb=config.WandbConfig(mode="online")))
    tracker.check(config.Recipe(wandb=config.WandbConfig(mode="offline")))
    assert asked == [True], "the server is asked, and only if it is needed"


def test_a_run_without_wandb_needs_no_wandb(train: Train) -> None:
    assert train("train.steps=1", fault="wandb is not installed").ok
