"""The reader of run folders. It turns them into frozen records, and only it knows the files of a run and of a sweep.

A run folder holds `recipe.yaml`, `provenance.json`, `diff.patch`, `metrics.jsonl` and, once the run has ended,
`summary.json`. A sweep folder holds run folders and `sweep.json`, its plan. A run or plan that the
reader cannot use becomes a `Fault` with the reason; the reader leaves out nothing in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hybrid_sp.shard import KINDS
from recipes import config
from recipes.lock import is_aside
from recipes.sweep import PLAN

RUN_FILES = ("recipe.yaml", "provenance.json", "metrics.jsonl", "summary.json", "train.log")
SECTIONS = tuple(one.name for one in fields(config.Recipe) if is_dataclass(one.default_factory))  # of a recipe
PROVENANCE: dict[str, Any] = {  # the entries that a report needs, and their types
    "commit": (str, type(None)), "dp": int, "sp": int, "machine.cpus": (int, type(None)), "versions.torch": str,
    "corpus.fingerprint": str, "corpus.files": int, "corpus.bytes": int,
}  # fmt: skip
FREE_KEYS = ("name", "out", "wandb", "model.linear", "model.ratio", "model.pattern", "model.mixers", "train.seed")
# The keys that change how a training is computed; its result stays the same up to rounding.
STRATEGY_KEYS = (*config.STRATEGY_KEYS, "train.recompute", "train.recompute_blocks")


@dataclass(frozen=True, kw_only=True)
class TrainPoint:
    """The record of one training step: loss in nats per token, tokens read by all ranks, bytes that rank 0 received.

    A number that an older run did not record is None. `received_by_kind`, bytes by kind of layer, then lacks its entry.
    """

    step: int
    tokens: int
    loss: float
    tokens_per_second: float
    received_bytes: int
    exposed_ms: float
    received_by_kind: Mapping[str, int] = field(default_factory=dict)
    calls: int | None = None
    memory_mb: float | None = None


@dataclass(frozen=True, kw_only=True)
class ValidationPoint:
    """The record of one validation: loss in nats per byte and in bits per byte."""

    step: int
    tokens: int
    loss: float
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """The record of a finished run.

    softmax   the share of softmax blocks
    linear    the names of the linear mixers; None if there are none
    modified  True if its code differed from the commit in the provenance
    """

    name: str
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    modified: bool
    pattern: str
    linear: str | None
    softmax: Fraction
    seed: int
    steps: int
    tokens: int
    seconds: float
    parameters: int
    loss: float
    bits_per_byte: float
    unigram_bits_per_byte: float
    train: tuple[TrainPoint, ...]
    validation: tuple[ValidationPoint, ...]

    @property
    def below_unigram(self) -> float:
        """Return the share of the unigram entropy that the model saves, 1 - bits_per_byte / unigram_bits_per_byte.

        It is NaN for a text whose bytes are all equal.
        """
        return 1 - self.bits_per_byte / self.unigram_bits_per_byte if self.unigram_bits_per_byte else math.nan


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The name of a run that the report cannot use, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The content of a sweep's folder: finished runs, faults, and the plan (None if runs were started by hand)."""

    path: Path
    runs: tuple[Run, ...]
    faults: tuple[Fault, ...]
    plan: Mapping[str, Any] | None


def read_folder(path: str | Path) -> Folder:
    """Read every run of a sweep folder, except those that a later start moved aside to NAME.old-1.

    Raises ValueError if there is no such folder or it holds no finished run.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give the folder of a sweep, such as runs/hybrid_ratio")
    runs: list[Run] = []
    faults: list[Fault] = []
    try:
        plan = _read_plan(path / PLAN)
    except ValueError as error:
        plan = None
        faults.append(Fault(name=PLAN, reason=str(error)))
    planned = [cell["name"] for cell in plan["cells"]] if plan else []
    folders = [child for child in path.iterdir() if not is_aside(child.name)]
    present = sorted(child.name for child in folders if any((child / file).is_file() for file in RUN_FILES))
    for name in dict.fromkeys([*planned, *present]):
        try:
            if name not in present:
                raise ValueError("missing: the sweep names it, and it was never started")
            if planned and name not in planned:
                raise ValueError(
                    "not of this sweep: sweep.json does not name it; delete the folder or run the sweep again"
                )
            runs.append(read_run(path / name))
        except ValueError as error:
            faults.append(Fault(name=name, reason=str(error)))
    if not runs:
        found = "; ".join(f"{fault.name}: {fault.reason}" for fault in faults) or "no run folders at all"
        raise ValueError(f"{path} holds no finished run ({found}); run a sweep first: python -m recipes.sweep FILE")
    return Folder(path=path, runs=tuple(runs), faults=tuple(faults), plan=plan)


def read_run(folder: Path) -> Run:
    """Read one finished run. Raises a ValueError that names each missing, half-written or contradictory part."""
    train, validation = _read_metrics(folder / "metrics.jsonl")
    if not (folder / "summary.json").is_file():
        last = max((point.step for point in train), default=0)
        raise ValueError(f"unfinished: there is no summary.json, and the last step in metrics.jsonl is {last}")
    summary = _read(folder / "summary.json")
    if summary.get("status") != "finished":
        raise ValueError(
            f"{summary.get('status')}: summary.json says so after {summary.get('steps')} steps; see train.log"
        )
    recipe = _read(folder / "recipe.yaml")
    config.check_format(recipe.pop("format", config.UNNAMED), folder / "recipe.yaml")
    if missing := [name for name in SECTIONS if not isinstance(recipe.get(name), Mapping)]:
        raise ValueError(f"half-written: recipe.yaml lacks {', '.join(missing)}")
    provenance = _read(folder / "provenance.json")
    told = dict(_flatten(provenance))
    if missing := [key for key, kind in PROVENANCE.items() if key not in told or not isinstance(told[key], kind)]:
        raise ValueError(f"half-written: provenance.json lacks {', '.join(missing)}")
    try:
        letters = str(summary["pattern"])
        run = Run(
            name=folder.name,
            recipe=recipe,
            provenance=provenance,
            modified=_is_modified(folder, provenance),
            pattern=letters,
            linear=_linear_kind(recipe["model"], letters),
            softmax=Fraction(letters.count("N"), len(letters)),
            seed=int(recipe["train"]["seed"]),
            steps=int(summary["steps"]),
            tokens=int(summary["tokens"]),
            seconds=float(summary["seconds"]),
            parameters=int(summary["parameters"]),
            loss=float(summary["validation_loss"]),
            bits_per_byte=float(summary["bits_per_byte"]),
            unigram_bits_per_byte=float(summary["unigram_bits_per_byte"]),
            train=train,
            validation=validation,
        )
    except KeyError as error:
        raise ValueError(f"half-written: recipe.yaml or summary.json lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"half-written: recipe.yaml or summary.json cannot be used ({error})") from None
    _check(run)
    return run


def _check(run: Run) -> None:
    if not run.train or not run.validation:
        raise ValueError("half-written: metrics.jsonl holds no training step or no validation")
    if not math.isclose(run.loss / math.log(2), run.bits_per_byte, rel_tol=1e-6):
        raise ValueError(f"contradiction: {run.loss} nats per byte is not {run.bits_per_byte} bits per byte")
    last = run.validation[-1].bits_per_byte
    if not math.isclose(last, run.bits_per_byte, rel_tol=1e-6):
        raise ValueError(
            f"contradiction: summary.json says {run.bits_per_byte} bits per byte, metrics.jsonl ends with {last}"
        )


def _linear_kind(model: Mapping[str, Any], letters: str) -> str | None:
    if "L" not in letters:
        return None
    if isinstance(model["pattern"], str) or model["pattern"] is None:
        return str(model["linear"])
    return "+".join(
        dict.fromkeys(name for name, letter in zip(model["pattern"], letters, strict=False) if letter == "L")
    )


def _is_modified(folder: Path, provenance: Mapping[str, Any]) -> bool:
    patch = folder / "diff.patch"
    new_code = any(name.endswith((".py", ".yaml")) for name in provenance.get("untracked", []))
    return new_code or (patch.is_file() and patch.stat().st_size > 0)


def _read(file: Path) -> dict[str, Any]:
    """Read the named values of a file of JSON or YAML."""
    try:
        yaml = file.suffix == ".yaml"
        record: Any = OmegaConf.to_container(OmegaConf.load(file)) if yaml else json.loads(file.read_text())
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"half-written: {file.name} cannot be read ({reason})") from None
    if not isinstance(record, dict):
        raise ValueError(f"half-written: {file.name} holds {type(record).__name__} instead of named values")
    return record


def _read_plan(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    plan = _read(file)
    cells = plan.get("cells")
    if not (isinstance(cells, list) and all(isinstance(cell, dict) and "name" in cell for cell in cells)):
        raise ValueError(f"half-written: {file.name} names no cells, so runs that were never started cannot be named")
    if missing := [key for key in ("name", "command") if key not in plan]:
        raise ValueError(f"half-written: {file.name} lacks {', '.join(missing)}")
    return plan


def _read_metrics(file: Path) -> tuple[tuple[TrainPoint, ...], tuple[ValidationPoint, ...]]:
    """Read the points of metrics.jsonl, sorted by step.

    After a resume the file may hold a step twice; the later line counts.
    """
    if not file.is_file():
        raise ValueError("half-written: there is no metrics.jsonl")
    train: dict[int, TrainPoint] = {}
    validation: dict[int, ValidationPoint] = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            step, tokens, loss = int(row["step"]), int(row["tokens"]), float(row["loss"])
            if row["kind"] == "train":
                train[step] = TrainPoint(
                    step=step,
                    tokens=tokens,
                    loss=loss,
                    tokens_per_second=float(row["tokens_per_second"]),
                    received_bytes=int(row["comm/bytes"]),
                    exposed_ms=float(row["comm/exposed_ms"]),
                    received_by_kind={kind: row[key] for kind in KINDS if (key := f"comm/bytes_{kind}") in row},
                    calls=row.get("comm/calls"),
                    memory_mb=row.get("memory_mb"),
                )
            elif row["kind"] == "validation":
                validation[step] = ValidationPoint(
                    step=step, tokens=tokens, loss=loss, bits_per_byte=float(row["bits_per_byte"])
                )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"half-written: line {number} of metrics.jsonl cannot be read ({error})") from None
    return tuple(train[step] for step in sorted(train)), tuple(validation[step] for step in sorted(validation))


# Comparisons of several runs


def strategies(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return each run's values of the strategy keys that differ between runs, spelled as after `key=`."""
    keys = [key for key in differing_keys(runs) if key in STRATEGY_KEYS]
    values = [dict(_flatten(run.recipe)) for run in runs]
    return [{key: _text(one[key]) if key in one else "not recorded" for key in keys} for one in values]


def axes(folder: Folder) -> list[str]:
    """Return the axes of a sweep's plan, except mixers, their share, seeds and strategies."""
    cells = folder.plan["cells"] if folder.plan else ()
    keys = dict.fromkeys(key for cell in cells for place in cell.get("covers", ()) for key in place)
    return [key for key in keys if key not in (*FREE_KEYS, *STRATEGY_KEYS)]


def value_of(run: Run, key: str) -> str:
    """Return the value of a dotted key in a run's recipe, spelled as after `key=`.

    The value is empty if the recipe lacks the key, and for options of mixers if no block is linear.
    """
    value: Any = {} if run.linear is None and key.startswith("model.mixers") else run.recipe
    for name in key.split("."):
        value = value.get(name, "") if isinstance(value, Mapping) else ""
    return _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Return the recipe keys whose values differ between runs, except the kind and share of mixers and the seed."""
    flat = [dict(_flatten(run.recipe)) for run in runs]
    keys = sorted({key for one in flat for key in one})
    return [
        key for key in keys if not is_under(key, FREE_KEYS) and any(one.get(key) != flat[0].get(key) for one in flat)
    ]


def is_under(key: str, parents: Iterable[str]) -> bool:
    """Return True if a dotted key is one of `parents` or lies under one."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _flatten(record: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
