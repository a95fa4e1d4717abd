"""Checkpoints are whole or not there: kill -9 anywhere, then resume, gives the same losses, bit by bit."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from recipes import checkpoint, config
from recipes.load import load_resolved
from recipes.record import read_metrics
from tests.recipes.conftest import Train
from tests.recipes.program import run_program
from tests.support.tiers import tiered

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process reads a checkpoint

LOSSES = ("kind", "step", "loss", "grad_norm", "lr", "tokens")


def losses(folder: Path) -> list[dict[str, Any]]:
    return [{key: line.get(key) for key in LOSSES} for line in read_metrics(folder / "metrics.jsonl")]


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint of a run, also the ranks' random states."""
    path = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    metadata = checkpoint.dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in metadata.items()}
    checkpoint.dcp.load(tensors, storage_reader=checkpoint.dcp.FileSystemReader(path), no_dist=True)
    return tensors


def assert_same_run(folder: Path, want: Path) -> None:
    assert losses(folder) == losses(want)
    got_tensors, want_tensors = saved_tensors(folder), saved_tensors(want)
    assert got_tensors.keys() == want_tensors.keys()
    for name in got_tensors.keys() - {"progress.seconds"}:
        assert torch.equal(got_tensors[name], want_tensors[name]), name


@pytest.fixture(scope="session")
def uninterrupted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of eight steps on two ranks that nothing disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    done = run_program(str(tiny), f"out={out}", "name=run", ranks=2)
    assert done.ok, done
    return out / "run"


def test_a_checkpoint_holds_everything(uninterrupted: Path) -> None:
    names = saved_tensors(uninterrupted).keys()
    weights = [name.removeprefix("model.") for name in names if name.startswith("model.")]
    assert "blocks.1.mixer.output.weight" in weights
    assert {f"optimizer.{name}.{part}" for name in weights for part in ("exp_avg", "exp_avg_sq", "step")} < names
    assert {"progress.step", "rng.cpu-0", "rng.cpu-1"} < names
    states = saved_tensors(uninterrupted)
    assert not torch.equal(states["rng.cpu-0"], states["rng.cpu-1"])


def test_the_newest_are_kept_and_latest_names_the_last(uninterrupted: Path) -> None:
    names = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert names == ["latest", "step-00000006", "step-00000008"]
    assert (uninterrupted / "checkpoints" / "latest").read_text() == "step-00000008\n"


# A fault, the rank that it strikes (the first one completes a save), and where in a run of its own it strikes.
KILLS = [
    ("killed inside a shard file", 1, 2),
    ("killed before latest", 0, 2),
    ("killed before the first byte", 1, 2),
    ("killed before the manifest", 0, 2),
    ("killed before the rename", 0, 2),
    ("killed in a step", 1, 4),
]


@pytest.mark.parametrize(("fault", "rank", "nth"), tiered(KILLS[:2], KILLS[2:]))
def test_killed_twice_and_resumed(
    fault: str, rank: int, nth: int, train: Train, uninterrupted: Path, tmp_path: Path
) -> None:
    """Two runs die, at the second save (or fourth step) each makes; the third ends as if nothing had been."""
    for attempt in range(2):
        died = train(ranks=2, fault=fault, rank=rank, nth=nth)
        assert died.codes[rank] == -9 and died.codes[1 - rank] != 0, died
        assert ("resuming" in died.texts[0]) == (attempt == 1), died
    done = train(ranks=2)
    assert done.ok, done
    assert f"resuming   after step {6 if fault == 'killed before latest' else 4}," in done.texts[0], done
    assert "CORRUPT" not in done.texts[0]
    assert_same_run(tmp_path / "run", uninterrupted)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.fixture
def half_run(train: Train, uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run as if it had died after its last checkpoint."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize("damaged", tiered(["__1_0.distcp", ".metadata"], ["__0_0.distcp", "manifest.json"]))
def test_a_flipped_byte_is_found_and_the_checkpoint_before_taken(
    damaged: str, train: Train, half_run: Path, uninterrupted: Path
) -> None:
    path = half_run / "checkpoints" / "step-00000008" / damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = train(ranks=2)
    assert done.ok, done
    assert "checkpoint step-00000008 is CORRUPT" in done.texts[0] and damaged in done.texts[0], done
    assert "resuming   after step 6" in done.texts[0], done
    assert_same_run(half_run, uninterrupted)
    assert (half_run / "checkpoints" / "corrupt-step-00000008").exists()


def test_a_missing_file_is_found(half_run: Path) -> None:
    (half_run / "checkpoints" / "step-00000008" / "__1_0.distcp").unlink()
    found = checkpoint.find(half_run / "checkpoints", None)
    assert (
        found.path == half_run / "checkpoints" / "step-00000006"
        and "missing files: __1_0.distcp" in found.complaints[0]
    )


def test_without_a_sound_checkpoint_training_starts_anew(train: Train, half_run: Path, uninterrupted: Path) -> None:
    for path in half_run.glob("checkpoints/step-*"):
        (path / "manifest.json").unlink()
    done = train(ranks=2)
    assert done.ok and done.texts[0].count("CORRUPT") == 2 and "resuming" not in done.texts[0], done
    assert_same_run(half_run, uninterrupted)


def test_resuming_at_another_sp_size_goes_on_from_the_same_weights(
    train: Train, half_run: Path, uninterrupted: Path
) -> None:
    shutil.rmtree(half_run / "checkpoints" / "step-00000008")
    done = train(ranks=1)
    assert done.ok and "resuming   after step 6" in done.texts[0] and "sp 1" in done.texts[0], done
    for got, want in zip(losses(half_run), losses(uninterrupted), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=0 if got["step"] <= 6 else 1e-5), got


def test_a_full_disk_stops_every_rank_and_spares_the_checkpoint_before(
    train: Train, uninterrupted: Path, tmp_path: Path
) -> None:
    first = train("train.steps=8", ranks=2, fault="killed in a step", rank=1, nth=3)
    assert first.codes[1] == -9, first
    full = train(ranks=2, fault="disk is full", rank=1)
    assert full.codes == [1, 1] and full.texts[1] == "", full
    said = [line for line in full.texts[0].splitlines() if "No space left on device" in line]
    assert len(said) == 1 and said[0].startswith("error: step 4: checkpoint of step 4 was not written (rank 1)"), full
    assert "Traceback" not in full.texts[0] and full.texts[0].splitlines()[-1] == said[0], full
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert train(ranks=2).ok
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_full_disk_is_named_where_torch_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its archives lose the system's error if the disk is full in the middle of a tensor."""

    def save(*args: Any, **kwargs: Any) -> None:
        failure = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
        raise checkpoint.CheckpointException("write", {1: (failure, StackSummary())})

    monkeypatch.setattr(checkpoint.dcp, "save", save)
    for free, words in ((0, "No space left on device: .*unexpected pos"), (1 << 40, r"\(rank 1\): \[enforce fail")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(OSError, match=f"^checkpoint of step 3 was not written .*{words}"):
            checkpoint.save(tmp_path, 3, {}, 1, None)


def test_a_failure_on_the_first_rank_reaches_its_caller() -> None:
    def fail() -> None:
        raise OSError("read-only folder")

    with pytest.raises(OSError, match="read-only folder"):
        checkpoint.on_first_rank(fail, None)


def test_no_checkpoint_to_generate_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sound checkpoint"):
        checkpoint.load_weights(tmp_path, {})


def test_weights_of_a_run_load_in_one_process(uninterrupted: Path) -> None:
    from layers.model import HybridLM

    model = HybridLM(load_resolved(uninterrupted / "recipe.yaml").model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert checkpoint.load_weights(uninterrupted / "checkpoints", weights).name == "step-00000008"
    saved = saved_tensors(uninterrupted)
    assert all(torch.equal(p, saved[f"model.{name}"]) for name, p in model.named_parameters())


# Formats


def test_another_format_is_refused_and_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, weights = one_matrix(tmp_path)
    (path / "manifest.json").unlink()
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "FORMAT", 2)
        checkpoint._write_manifest(path)
    for read in (lambda: checkpoint.load_weights(tmp_path, weights), lambda: checkpoint.find(tmp_path, None)):
        with pytest.raises(config.RecipeError, match=r"^.*manifest\.json is of format '2', and .* reads format 1; .*$"):
            read()
    assert path.exists() and not weights["weight"].any()


def test_a_manifest_of_the_first_runs_names_no_format(tmp_path: Path) -> None:
    """It seals its files alone, as it was written then."""
    path, weights = one_matrix(tmp_path)
    files = json.loads((path / "manifest.json").read_text())["files"]
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"files": files, "sha256": digest}, indent=1))
    assert checkpoint.load_weights(tmp_path, weights) == path and weights["weight"].all()


def test_a_flipped_format_is_a_fault_like_any_other(tmp_path: Path) -> None:
    path, _ = one_matrix(tmp_path)
    text = (path / "manifest.json").read_text()
    assert '"format": 1,' in text
    (path / "manifest.json").write_text(text.replace('"format": 1,', '"format": 3,'))
    assert checkpoint._fault(path) == "manifest.json was changed"


# What a stranger may hand over: the manifest is of the stranger's making too.


class Code:
    """Code that runs when this is unpickled: it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def one_matrix(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of one matrix as this program writes it, and the tensors to read it into."""
    state = {"model": {"weight": torch.ones(2, 3)}, "rng": {}}
    return checkpoint.save(folder, 1, state, keep=1, group=None), {"weight": torch.zeros(2, 3)}


def metadata_is(path: Path, content: Any, name: str = ".metadata") -> None:
    (path / name).write_bytes(pickle.dumps(content))


def metadata_of(path: Path) -> Any:
    return pickle.loads((path / ".metadata").read_bytes())


def shard_is(path: Path, content: Any) -> Any:
    """Another content where the matrix was, and the metadata that tells where it lies."""
    torch.save(content, path / "__0_0.distcp")
    metadata = metadata_of(path)
    for one in metadata.storage_data.values():
        one.length = (path / "__0_0.distcp").stat().st_size
    metadata_is(path, metadata)
    return metadata


def code_as_metadata(path: Path, proof: Path) -> None:
    metadata_is(path, Code(proof))


def code_within_metadata(path: Path, proof: Path) -> None:
    metadata_is(path, replace(metadata_of(path), planner_data=Code(proof)))


def code_as_metadata_of_one_rank(path: Path, proof: Path) -> None:
    """Which torch reads if it cannot read the metadata of all."""
    (path / ".metadata").write_bytes(b"")
    metadata_is(path, Code(proof), "__0.metadata")


def bytes_instead_of_a_tensor(path: Path, proof: Path) -> None:
    """Which torch unpickles without a restriction."""
    metadata = shard_is(path, Code(proof))
    (place,) = metadata.storage_data.values()
    tensors = {"model.weight": BytesStorageMetadata()}
    metadata_is(
        path, replace(metadata, state_dict_metadata=tensors, storage_data={MetadataIndex("model.weight"): place})
    )


def code_as_a_shard(path: Path, proof: Path) -> None:
    shard_is(path, Code(proof))


def code_beside_a_tensor(path: Path, proof: Path) -> None:
    shard_is(path, [torch.ones(2, 3), Code(proof)])


def a_file_of_another_folder(path: Path, proof: Path) -> None:
    metadata = metadata_of(path)
    for one in metadata.storage_data.values():
        one.relative_path = f"../{path.name}/{one.relative_path}"
    metadata_is(path, metadata)


def text_as_metadata(path: Path, proof: Path) -> None:
    metadata_is(path, "text")


def empty_metadata(path: Path, proof: Path) -> None:
    (path / ".metadata").write_bytes(b"")


def no_tensor_of_that_name(path: Path, proof: Path) -> None:
    metadata = metadata_of(path)
    metadata_is(path, replace(metadata, state_dict_metadata={}, storage_data={}))


HOSTILE: list[tuple[Callable[[Path, Path], None], str]] = [
    (code_as_metadata, "it names .*, which no checkpoint needs; take a checkpoint that you trust"),
    (code_within_metadata, "it names .*, which no checkpoint needs"),
    (code_as_metadata_of_one_rank, "Ran out of input"),
    (bytes_instead_of_a_tensor, "it names .*BytesStorageMetadata, which no checkpoint needs"),
    (code_as_a_shard, "a file of it holds more than tensors; take a checkpoint that you trust"),
    (code_beside_a_tensor, "a file of it holds more than tensors"),
    (a_file_of_another_folder, "it describes more than tensors in this folder"),
    (text_as_metadata, "it describes more than tensors in this folder"),
    (empty_metadata, "Ran out of input"),
    (no_tensor_of_that_name, "does not fit this run: Missing key .*model.weight"),
]


@pytest.mark.parametrize(("attack", "reason"), HOSTILE, ids=[attack.__name__ for attack, _ in HOSTILE])
def test_a_checkpoint_of_a_stranger_runs_nothing(
    attack: Callable[[Path, Path], None], reason: str, tmp_path: Path
) -> None:
    """Both ways to read one refuse it in one line, though its manifest holds."""
    (path, weights), proof = one_matrix(tmp_path / "checkpoints"), tmp_path / "it ran"
    attack(path, proof)
    (path / "manifest.json").unlink()
    checkpoint._write_manifest(path)
    assert checkpoint.find(path.parent, None) == checkpoint.Found(path=path, complaints=[])
    refusals = []
    for read in (
        lambda: checkpoint.load_weights(path.parent, weights),
        lambda: checkpoint.load(path, {"model": weights, "rng": {}}, None),
    ):
        try:
            read()
        except BaseException as error:
            refusals.append(error)
        assert not proof.exists(), "code of the checkpoint was run"
    assert len(refusals) == 2 and not weights["weight"].any()
    for error in refusals:
        assert isinstance(error, config.RecipeError) and re.search(reason, str(error)), error
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


def test_metadata_is_read_by_this_program_alone(tmp_path: Path) -> None:
    """Sound metadata that torch cannot read under Python 3.12 and older, where it would turn to a rank's own."""
    path, weights = one_matrix(tmp_path / "checkpoints")
    newer = pickle.dumps(metadata_of(path), protocol=2).replace(b"cpathlib\n", b"cpathlib._local\n")
    (path / ".metadata").write_bytes(newer)
    metadata_is(path, Code(tmp_path / "it ran"), "__0.metadata")
    checkpoint.load(path, {"model": weights, "rng": {}}, None)
    assert weights["weight"].all() and not (tmp_path / "it ran").exists()


def test_the_code_of_these_tests_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Code(tmp_path / "it ran")))
    assert (tmp_path / "it ran").exists()
    path, weights = one_matrix(tmp_path / "checkpoints")
    assert checkpoint.load_weights(path.parent, weights) == path and weights["weight"].all()
