"""Checkpoints that are whole or not there, written by torch.distributed.checkpoint.

A save goes: shards into a temporary folder, a manifest with the format and the SHA-256 of every file, rename to
``step-00000100``, the pointer ``latest``, removal of the oldest. A process may die between any two of these; what a
reader takes is the newest folder whose manifest holds. (torch.distributed.checkpoint alone loads a flipped bit without
a word.)

Reading a checkpoint runs no code of whoever made it, manifest included: it holds tensors alone, which torch reads with
``weights_only``, and its ``.metadata``, a pickle, may name no more than the types that describe tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.api import CheckpointException

from hybrid_sp.comm import collectives, groups
from recipes.config import FORMAT, RecipeError, check_format

MANIFEST = "manifest.json"
METADATA = ".metadata"
TYPES: dict[tuple[str, str], Any] = {  # all that a .metadata may name, besides dtypes
    **{(one.__module__, one.__name__): one for one in (
        described.Metadata, described.MetadataIndex, described.StorageMeta, described.TensorStorageMetadata,
        described.TensorProperties, described.ChunkStorageMetadata, described._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo, torch.serialization._get_layout,
    )},
    ("torch", "Size"): torch.Size,
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
}  # fmt: skip
ROOM = 1 << 20  # bytes: a disk with less is full
Result = TypeVar("Result")
State = dict[str, dict[str, torch.Tensor]]  # section -> name -> tensor; the tensors are read into in place


@dataclass(frozen=True, kw_only=True)
class Found:
    """The newest sound checkpoint of a folder, if any, and what was wrong with newer ones."""

    path: Path | None
    complaints: list[str]


def save(folder: Path, step: int, state: State, keep: int, group: collectives.Group) -> Path:
    """Writes ``folder/step-...`` from all ranks of ``group`` and keeps the newest ``keep`` checkpoints.

    Every rank calls it with its own state: what stands under one name must be equal on all ranks, so what differs
    (random states) needs a name that says the rank. If any rank fails, every rank raises, OSError for files that cannot
    be written; the checkpoints before are untouched.
    """
    final, temporary = folder / f"step-{step:08d}", folder / f".saving-step-{step:08d}"
    try:
        on_first_rank(lambda: _make_empty(temporary), group)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary), process_group=group)
        on_first_rank(lambda: _complete(temporary, final, keep), group)
    except (OSError, CheckpointException) as error:  # the second, a BaseException, is raised on every rank
        failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
        rank, (cause, _) = min(failures.items(), key=lambda failure: failure[0])
        # On a full disk torch's archives say "unexpected pos".
        if not isinstance(cause, OSError) and shutil.disk_usage(folder).free < ROOM:
            cause = OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {cause}")
        raise OSError(f"checkpoint of step {step} was not written (rank {rank}): {cause}") from error
    return final


def find(folder: Path, group: collectives.Group) -> Found:
    """The newest checkpoint that passes its manifest, the same on every rank.

    Leftovers of saves that died are removed; folders that fail are renamed to ``corrupt-step-...`` and named.
    """
    return on_first_rank(lambda: _find(folder), group)


def load(path: Path, state: State, group: collectives.Group) -> None:
    """Reads a checkpoint into the tensors of ``state``; random states that it lacks (it had fewer ranks) stay.

    Raises RecipeError on every rank if a name is missing, a shape differs or anything in it is not a tensor.
    """
    reader = _Reader(path, on_first_rank(lambda: _metadata(path), group))
    stored = reader.metadata.state_dict_metadata
    random = {name: value for name, value in state.get("rng", {}).items() if f"rng.{name}" in stored}
    _read(reader, {**state, "rng": random}, process_group=group)


def load_weights(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Reads the model of the newest sound checkpoint into ``weights``, in one process; the folder stays as it is."""
    for path in _newest_first(folder):
        if _fault(path) is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be here
                _read(_Reader(path, _metadata(path)), {"model": weights}, no_dist=True)
            return path
    raise FileNotFoundError(f"{folder} holds no sound checkpoint; train the run first")


class _Reader(dcp.FileSystemReader):
    """Torch's, of metadata that was read before: its own way to read it runs the code in it."""

    def __init__(self, path: Path, metadata: described.Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> described.Metadata:
        return self.metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if (module, name) not in TYPES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return TYPES[module, name]


def _metadata(path: Path) -> described.Metadata:
    """What a checkpoint says of its tensors. Raises RecipeError if it says anything else."""
    try:
        with (path / METADATA).open("rb") as file:
            metadata: described.Metadata = _Unpickler(file).load()
        if not (
            isinstance(metadata, described.Metadata)
            and all(isinstance(one, described.TensorStorageMetadata) for one in metadata.state_dict_metadata.values())
            and all(Path(one.relative_path).name == one.relative_path for one in metadata.storage_data.values())
        ):
            raise pickle.UnpicklingError("it describes more than tensors in this folder")
    except Exception as error:  # what a broken pickle raises may be of any kind
        raise RecipeError(
            f"checkpoint {path}: {METADATA} is refused: {_first_line(error)}; take a checkpoint that you trust"
        ) from error
    return metadata


def _read(reader: _Reader, state: dict[str, Any], **where: Any) -> None:
    try:
        dcp.load(state, storage_reader=reader, **where)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        reason = f"does not fit this run: {_first_line(cause)}"
        if isinstance(cause, pickle.UnpicklingError):
            reason = "is refused: a file of it holds more than tensors; take a checkpoint that you trust"
        raise RecipeError(f"checkpoint {reader.path} {reason}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def random_state(rank: int) -> dict[str, torch.Tensor]:
    """This rank's random states under names of its own."""
    state = {f"cpu-{rank}": torch.get_rng_state()}
    return state | ({f"cuda-{rank}": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restores what `random_state` returned."""
    for name, value in state.items():
        (torch.cuda.set_rng_state if name.startswith("cuda") else torch.set_rng_state)(value)


def on_first_rank(action: Callable[[], Result], group: collectives.Group) -> Result:
    """Runs ``action`` on the group's first rank and returns its result, or raises its exception, on every rank."""
    result: Any = None
    failure: Exception | None = None
    if groups.rank(group) == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
    result, failure = collectives.gather_objects((result, failure), group)[0]
    if failure is not None:
        raise failure
    return result


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(temporary: Path, final: Path, keep: int) -> None:
    _write_manifest(temporary)
    os.rename(temporary, final)
    _sync(final.parent)
    _point(final.parent / "latest", final.name)
    for path in _newest_first(final.parent)[keep:]:
        doomed = path.with_name(f".removing-{path.name}")  # so that no half of a checkpoint has a checkpoint's name
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in sorted(folder.iterdir())}
    content = {"format": FORMAT, "files": files}
    _write_synced(folder / MANIFEST, json.dumps({**content, "sha256": _seal(content)}, indent=1))
    _sync(folder)


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_name(".latest")
    _write_synced(temporary, name + "\n")
    os.replace(temporary, pointer)
    _sync(pointer.parent)


def _find(folder: Path) -> Found:
    for leftover in (*folder.glob(".saving-*"), *folder.glob(".removing-*")):
        shutil.rmtree(leftover)
    complaints: list[str] = []
    for path in _newest_first(folder):
        fault = _fault(path)
        if fault is None:
            _point(folder / "latest", path.name)  # a save may have died before this, or what it named be corrupt
            return Found(path=path, complaints=complaints)
        aside = path.with_name(f"corrupt-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        complaints.append(f"checkpoint {path.name} is CORRUPT ({fault}); moved to {aside} and not used")
    return Found(path=None, complaints=complaints)


def _fault(path: Path) -> str | None:
    """Says what is wrong with a checkpoint, or None; raises RecipeError if it is sound and of another format."""
    try:
        content = json.loads((path / MANIFEST).read_text())
        if content["sha256"] != _seal(content):
            return f"{MANIFEST} was changed"
        check_format(content.get("format", FORMAT), path / MANIFEST)
        files = content["files"]
        if missing := files.keys() - {file.name for file in path.iterdir()}:
            return f"missing files: {', '.join(sorted(missing))}"
        for name, facts in files.items():
            if _hash(path / name) != facts["sha256"]:
                return f"{name} does not have the SHA-256 of its manifest"
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error!r}"
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-????????"), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _seal(content: dict[str, Any]) -> str:
    """The SHA-256 of a manifest without this hash itself; of its files alone if it is too old to name a format."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(rest if "format" in rest else rest["files"], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
