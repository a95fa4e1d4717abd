"""Save checkpoints that are complete or absent, with torch.distributed.checkpoint.

A save has five steps:

1. Write the shards into a temporary folder.
2. Write a manifest with the format and the SHA-256 of every file.
3. Rename the folder to ``step-00000100``.
4. Write the pointer ``latest``.
5. Remove the oldest checkpoints.

A process may die between any two of these. A reader takes the newest folder whose manifest is correct.
(torch.distributed.checkpoint alone loads a flipped bit without an error.)

Reading a checkpoint runs no code of its author. It holds only tensors, which torch reads with ``weights_only``. Its
``.metadata``, a pickle, may name only the types that describe tensors.
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
from recipes.config import FORMAT, UNNAMED, RecipeError, check_format, first_line
from recipes.record import replace_file

MANIFEST = "manifest.json"
METADATA = ".metadata"
TYPES: dict[tuple[str, str], Any] = {  # a .metadata may name these and dtypes
    **{(named.__module__, named.__name__): named for named in (
        described.Metadata, described.MetadataIndex, described.StorageMeta, described.TensorStorageMetadata,
        described.TensorProperties, described.ChunkStorageMetadata, described._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo, torch.serialization._get_layout,
    )},
    ("torch", "Size"): torch.Size,
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
}  # fmt: skip
ROOM = 1 << 20  # bytes: a disk with less is full
Result = TypeVar("Result")
State = dict[str, dict[str, torch.Tensor]]  # section -> name -> tensor; reading fills the tensors in place


@dataclass(frozen=True, kw_only=True)
class Found:
    """Hold the newest sound checkpoint of a folder, if any, and the faults of newer ones."""

    path: Path | None
    complaints: list[str]


def save(folder: Path, step: int, state: State, keep: int, group: collectives.Group) -> Path:
    """Write ``folder/step-...`` from all ranks of ``group`` and keep the newest ``keep`` checkpoints.

    Every rank calls it with its own state. A tensor must be equal on all ranks, or have a name with the rank in it, as
    random states do. If any rank fails, every rank raises; the error is OSError if a file cannot be written. Earlier
    checkpoints stay untouched.
    """
    final, temporary = folder / f"step-{step:08d}", folder / f".saving-step-{step:08d}"
    try:
        on_first_rank(lambda: _make_empty(temporary), group)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary), process_group=group)
        on_first_rank(lambda: _complete(temporary, final, keep), group)
    except (OSError, CheckpointException) as error:  # the second is a BaseException, raised on every rank
        failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
        rank, (cause, _) = min(failures.items(), key=lambda failure: failure[0])
        # On a full disk torch's archives report only "unexpected pos".
        if not isinstance(cause, OSError) and shutil.disk_usage(folder).free < ROOM:
            cause = OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {cause}")
        raise OSError(f"checkpoint of step {step} was not written (rank {rank}): {cause}") from error
    return final


def find(folder: Path, group: collectives.Group) -> Found:
    """Find the newest checkpoint that passes its manifest, the same on every rank.

    Remove leftovers of interrupted saves; rename every folder that fails to ``corrupt-step-...`` and report it.
    """
    return on_first_rank(lambda: _find(folder), group)


def load(path: Path, state: State, group: collectives.Group) -> None:
    """Read a checkpoint into the tensors of ``state``; a checkpoint of fewer ranks leaves other random states alone.

    Raise RecipeError on every rank if a name is missing, a shape differs or anything in it is not a tensor.
    """
    reader = _Reader(path, on_first_rank(lambda: _metadata(path), group))
    stored = reader.metadata.state_dict_metadata
    random = {name: value for name, value in state.get("rng", {}).items() if f"rng.{name}" in stored}
    _read(reader, {**state, "rng": random}, process_group=group)


def load_weights(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Read the model of the newest sound checkpoint into ``weights``, in one process, and change no file."""
    for path in _newest_first(folder):
        if _fault(path) is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended here
                _read(_Reader(path, _metadata(path)), {"model": weights}, no_dist=True)
            return path
    raise FileNotFoundError(f"{folder} holds no sound checkpoint; train the run first")


class _Reader(dcp.FileSystemReader):
    """Read files as torch does, with metadata that is already loaded; torch itself would run the code in it."""

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
    """Read the description of a checkpoint's tensors; raise RecipeError if it describes anything else."""
    try:
        with (path / METADATA).open("rb") as file:
            metadata: described.Metadata = _Unpickler(file).load()
        if not (
            isinstance(metadata, described.Metadata)
            and all(
                isinstance(entry, described.TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()
            )
            and all(Path(file.relative_path).name == file.relative_path for file in metadata.storage_data.values())
        ):
            raise pickle.UnpicklingError("it describes more than tensors in this folder")
    except Exception as error:  # a broken pickle can raise any exception
        raise RecipeError(
            f"checkpoint {path}: {METADATA} is refused: {first_line(error)}; take a checkpoint that you trust"
        ) from error
    return metadata


def _read(reader: _Reader, state: dict[str, Any], **where: Any) -> None:
    try:
        dcp.load(state, storage_reader=reader, **where)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        reason = f"does not fit this run: {first_line(cause)}"
        if isinstance(cause, pickle.UnpicklingError):
            reason = "is refused: a file of it holds more than tensors; take a checkpoint that you trust"
        raise RecipeError(f"checkpoint {reader.path} {reason}") from error


def random_state(rank: int) -> dict[str, torch.Tensor]:
    """Return the random states of this rank, under names with the rank in them."""
    state = {f"cpu-{rank}": torch.get_rng_state()}
    return state | ({f"cuda-{rank}": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restore the result of `random_state`."""
    for name, value in state.items():
        (torch.cuda.set_rng_state if name.startswith("cuda") else torch.set_rng_state)(value)


def on_first_rank(action: Callable[[], Result], group: collectives.Group) -> Result:
    """Run ``action`` on the group's first rank; return its result, or raise its exception, on every rank."""
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
        doomed = path.with_name(f".removing-{path.name}")  # a partly removed checkpoint must not have a valid name
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in sorted(folder.iterdir())}
    content = {"format": FORMAT, "files": files}
    replace_file(folder / MANIFEST, json.dumps({**content, "sha256": _seal(content)}, indent=1))
    _sync(folder)


def _point(pointer: Path, name: str) -> None:
    replace_file(pointer, name + "\n")
    _sync(pointer.parent)


def _find(folder: Path) -> Found:
    for leftover in (*folder.glob(".saving-*"), *folder.glob(".removing-*")):
        shutil.rmtree(leftover)
    complaints: list[str] = []
    for path in _newest_first(folder):
        fault = _fault(path)
        if fault is None:
            _point(folder / "latest", path.name)  # a dead save, or a corrupt checkpoint, leaves it wrong
            return Found(path=path, complaints=complaints)
        aside = path.with_name(f"corrupt-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        complaints.append(f"checkpoint {path.name} is CORRUPT ({fault}); moved to {aside} and not used")
    return Found(path=None, complaints=complaints)


def _fault(path: Path) -> str | None:
    """Describe the fault of a checkpoint, or return None; raise RecipeError for a sound one of another format."""
    try:
        content = json.loads((path / MANIFEST).read_text())
        if content["sha256"] != _seal(content):
            return f"{MANIFEST} was changed"
        check_format(content.get("format", UNNAMED), path / MANIFEST)
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
    return sorted(folder.glob("step-" + 8 * "[0-9]"), reverse=True)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _seal(content: dict[str, Any]) -> str:
    """Compute the SHA-256 of a manifest without the hash itself; of its files only, if it has no format."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(rest if "format" in rest else rest["files"], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
