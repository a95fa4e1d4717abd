"""Run a sweep: one base recipe, axes of values, one run per cell. `python -m recipes.sweep FILE [key=value ...]`.

A sweep file holds the fields of `Sweep`. Every cell of the product of the axes is a run in `<out>/<sweep>/<cell>/`.
Each run is a process of its own, or a torchrun of `nproc` ranks, and writes its output to `train.log` there. Cells that
resolve to the same experiment run once. A finished run is skipped; a broken one starts again from its checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layers.config import mixer_specs, model_layers
from layers.registry import mixer_cost
from recipes import config, lock, record
from recipes.load import file_name, load_recipe
from recipes.typed_yaml import Written, key_and_text, override, read, refuse_text, typed
from recipes.validate import validate

PLAN = "sweep.json"
LOG = "train.log"
PROMPT = "$ python "  # begins the log of every attempt, before its command
TAIL = 15  # last lines of a failed run's log, for the report
SEED = "train.seed"
RECORDING = ("name", "out", "wandb.")  # keys of where a run is recorded, which do not change its results


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Add seeds to one cell: `cell` gives a value for each axis (or for enough of them), `values` the seeds."""

    cell: dict[str, str] = field(default_factory=dict, metadata={"kind": lambda key: Written})
    values: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Hold a sweep file: `set` has recipe keys for every run, `axes` a list of values per recipe key.

    Values stay as a user would type them behind `key=`. They get their type when a cell's recipe is read.
    """

    name: str
    base: str
    set: dict[str, str] = field(default_factory=dict, metadata={"kind": lambda key: Written})
    axes: dict[str, list[str]] = field(default_factory=dict, metadata={"kind": lambda key: list[Written]})
    seeds: Seeds = field(default_factory=Seeds)
    nproc: int = 1  # ranks of one run
    parallel: int = 1  # runs at a time


OWN_KEYS = ("name", "nproc", "parallel")  # key=value sets these on the sweep itself, and all other keys on every run


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Hold one run: its name, its overrides of the base recipe, and the points of the axes that it covers."""

    name: str
    overrides: tuple[str, ...]
    covers: tuple[dict[str, str], ...]
    recipe: config.Recipe

    @property
    def folder(self) -> Path:
        """Return the folder of the run."""
        return config.run_folder(self.recipe)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Tell how one run ended: `state` is finished, skipped or failed; `note` is its result or the cause of failure."""

    cell: Cell
    state: str
    seconds: float
    note: str


# The plan: from a sweep file to cells


def load(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and apply `key=value` overrides: `name`, `nproc`, `parallel`, or any recipe key for every run.

    Raise ValueError for a missing file, an unknown key, a wrong type, or an override of a key that is an axis.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"sweep file {path} does not exist; give the path of a YAML file such as recipes/ablations/*.yaml"
        )
    try:
        layers = [typed(read(path), Sweep), *map(_override, overrides)]
        refuse_text(layers, f"sweep file {path}")
        sweep = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Sweep), *layers))
    except OmegaConfBaseException as error:
        keys = ", ".join(key.name for key in fields(Sweep))
        raise ValueError(f"sweep file {path}: {config.first_line(error)}; a sweep has the keys {keys}") from None
    assert isinstance(sweep, Sweep)
    _check(sweep, path)
    return sweep


def _override(argument: str) -> dict[str, Any]:
    key, text = key_and_text(argument)
    return override(argument, Sweep) if key in OWN_KEYS else {"set": {key: text}}


def _check(sweep: Sweep, path: Path) -> None:
    if not sweep.axes or not all(sweep.axes.values()):
        raise ValueError(
            f"sweep file {path}: axes must hold at least one key with at least one value, got {sweep.axes}"
        )
    if both := sorted(set(sweep.axes) & set(sweep.set)):
        raise ValueError(
            f"sweep file {path}: {', '.join(both)} is an axis and also set for every run; keep one of them"
        )
    for key in ("nproc", "parallel"):
        if getattr(sweep, key) < 1:
            raise ValueError(f"sweep file {path}: {key} is {getattr(sweep, key)}; it must be at least 1")


def plan(sweep: Sweep, path: str | Path) -> list[Cell]:
    """Expand the axes into cells, in the order of the file, and merge cells that are the same experiment.

    Two points of the axes are one experiment if their block patterns and the rest of their recipes are equal. Without
    a linear block, for example, the kind of linear block does not matter. All recipes are resolved and validated
    here, before anything runs. Raise ValueError with the name of the cell for a recipe that is not valid.
    """
    base = base_recipe(sweep, path)
    product = [dict(zip(sweep.axes, values, strict=True)) for values in itertools.product(*sweep.axes.values())]
    groups: dict[str, tuple[config.Recipe, list[dict[str, str]]]] = {}
    for point in product + _seeded(sweep, product):
        recipe = _resolve(base, sweep, point)
        groups.setdefault(_experiment(recipe), (recipe, []))[1].append(point)
    names = [_name(_shared(members)) for _, members in groups.values()]
    if len(set(names)) < len(names):
        names = [_name(members[0]) for _, members in groups.values()]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two cells would share a folder name: {sorted(names)}; give axis values that differ in letters or digits"
        )
    return [
        Cell(
            name=name,
            overrides=_overrides(sweep, members[0], name),
            covers=tuple(members),
            recipe=replace(recipe, name=f"{sweep.name}/{name}"),
        )
        for name, (recipe, members) in zip(names, groups.values(), strict=True)
    ]


def base_recipe(sweep: Sweep, path: str | Path) -> Path:
    """Return the path of the base recipe from the working directory; a sweep file names it relative to itself."""
    return Path(os.path.relpath(Path(path).parent / sweep.base))


def _seeded(sweep: Sweep, product: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the cell of `seeds` once for each of its values."""
    wanted = sweep.seeds.cell
    found = [point for point in product if wanted.items() <= point.items()]
    if sweep.seeds.values and len(found) != 1:
        raise ValueError(
            f"seeds.cell {wanted} names {len(found)} cells; give it one value for each of {list(sweep.axes)}"
        )
    return [found[0] | {SEED: str(seed)} for seed in sweep.seeds.values]


def _shared(members: list[dict[str, str]]) -> dict[str, str]:
    return {key: value for key, value in members[0].items() if all(member.get(key) == value for member in members)}


def _name(point: Mapping[str, str]) -> str:
    """Name the folder of a cell."""
    short = [key.rpartition(".")[2] for key in point]
    pairs = (
        f"{key if short.count(last) > 1 else last}-{value}"
        for (key, value), last in zip(point.items(), short, strict=True)
    )
    return file_name("_".join(re.sub(r"[\W_]", "-", pair) for pair in pairs)) or "all"


def _overrides(sweep: Sweep, point: Mapping[str, str], name: str) -> tuple[str, ...]:
    values = sweep.set | dict(point) | {"name": f"{sweep.name}/{name}"}
    return tuple(f"{key}={value}" for key, value in values.items())


def _resolve(base: Path, sweep: Sweep, point: Mapping[str, str]) -> config.Recipe:
    name = _name(point)
    try:
        recipe = load_recipe(base, list(_overrides(sweep, point, name)))
        validate(recipe, sweep.nproc)
    except ValueError as error:
        raise ValueError(f"cell {name} of sweep {sweep.name}: {error}") from None
    return recipe


def _experiment(recipe: config.Recipe) -> str:
    """Describe what a recipe computes, as a string to compare.

    The model counts by its pattern and by the options of the mixers in it. Strategies count only for the kinds of layer
    in the model.
    """
    pattern, values = model_layers(recipe.model), _recipe_values(recipe)
    costs = [mixer_cost(spec, context) for _, spec, context in mixer_specs(recipe.model)]
    kinds = {name for layer in pattern for name in layer.mixers}
    if not any(cost.summaries for cost in costs):
        values |= {"parallel.linear": None, "parallel.link": None}
    if not any(cost.attention for cost in costs):
        values |= {"parallel.softmax": None, "parallel.kv_heads_per_gather": None, "parallel.keep_kv": None}
    mixers = {kind: options for kind, options in recipe.model.mixers.items() if kind in kinds}
    model = {"model.linear": None, "model.ratio": None, "model.pattern": pattern, "model.mixers": mixers}
    return json.dumps(values | model, sort_keys=True, default=str)


def _recipe_values(recipe: config.Recipe) -> dict[str, Any]:
    return {key: value for key, value in config.flat(recipe).items() if not key.startswith(RECORDING)}


# The runs


def is_finished(cell: Cell) -> bool:
    """Tell whether the run is finished; raise ValueError if its folder holds another recipe or broken files."""
    if not (cell.folder / "recipe.yaml").is_file():
        return False
    old, new = _recipe_values(record.read_recipe(cell.folder)), _recipe_values(cell.recipe)
    if changed := [f"{key} was {old.get(key)}, now {new.get(key)}" for key in new if old.get(key) != new.get(key)]:
        raise ValueError(
            f"{cell.folder} holds a run of another recipe ({'; '.join(changed)}); "
            "delete that folder to run it again, or give the sweep a new name with name=..."
        )
    return (cell.folder / "summary.json").is_file() and record.read_summary(cell.folder)["status"] == "finished"


def command(sweep: Sweep, path: str | Path, cell: Cell, module: str = "recipes.train") -> list[str]:
    """Build the command line that trains a cell: plain Python for one rank, torchrun's own module for more."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={sweep.nproc}"] * (sweep.nproc > 1)
    return [sys.executable, *torchrun, "-m", module, str(base_recipe(sweep, path)), *cell.overrides]


def run(
    sweep: Sweep, path: str | Path, cells: Sequence[Cell], shown: str, module: str = "recipes.train"
) -> list[Outcome]:
    """Train every cell that is not finished, `sweep.parallel` at a time; return the outcomes in the order of `cells`.

    The sweep's folder records `shown` as its command line. A failed run does not stop the others. An interrupt first
    ends the running ones and is then raised again.
    """
    folder = cells[0].folder.parent
    with locked(folder) as held:
        done = {cell.name: is_finished(cell) for cell in cells}  # raises before the first run starts
        _write_plan(folder, sweep, path, cells, shown)
        outcomes: dict[str, Outcome] = {}
        waiting = list(cells)
        live: dict[subprocess.Popen[bytes], tuple[Cell, float]] = {}

        def say(cell: Cell, text: str) -> None:
            print(f"[{cells.index(cell) + 1}/{len(cells)}] {cell.name}: {text}", flush=True)

        try:
            while waiting or live:
                while waiting and len(live) < sweep.parallel:
                    cell = waiting.pop(0)
                    if done[cell.name]:
                        outcomes[cell.name] = Outcome(cell=cell, state="skipped", seconds=0.0, note=_result(cell))
                        say(cell, f"finished before: {outcomes[cell.name].note}")
                    else:
                        say(cell, f"running, output in {cell.folder / LOG}")
                        live[start(command(sweep, path, cell, module), cell, held)] = (cell, time.monotonic())
                for process in [process for process in live if process.poll() is not None]:
                    cell, began = live.pop(process)
                    outcomes[cell.name] = outcome = _ended(cell, process.returncode, time.monotonic() - began)
                    say(cell, f"{outcome.state} after {outcome.seconds:.0f} s: {outcome.note}")
                time.sleep(0.05)
        finally:
            _end(list(live))
    return [outcomes[cell.name] for cell in cells]


def locked(folder: Path) -> IO[str]:
    """Hold the folder's lock. Runs inherit it, so a run that outlives a killed sweep keeps the next sweep out."""
    return lock.take(
        folder / "sweep.lock",
        busy=f"another sweep works in {folder}, or a run that it left behind",
        advice="wait for it to end, or give this sweep a new name with name=...",
    )


def _write_plan(folder: Path, sweep: Sweep, path: str | Path, cells: Sequence[Cell], shown: str) -> None:
    content = {
        "name": sweep.name,
        "file": Path(path).as_posix(),
        "command": shown,
        "nproc": sweep.nproc,
        "cells": [{"name": cell.name, "covers": list(cell.covers)} for cell in cells],
    }
    (folder / PLAN).write_text(json.dumps(content, indent=1) + "\n")


def start(argv: list[str], cell: Cell, held: IO[str]) -> subprocess.Popen[bytes]:
    """Start the process of a run; it appends its output to the run's log and holds the sweep's lock until it ends."""
    if cell.recipe.checkpoint.resume == "never":  # move it here, because the log belongs in the new folder
        with suppress(config.RecipeError):  # another process trains there; the run itself reports it
            lock.set_aside(cell.folder).close()
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / LOG, "ab") as log:
        log.write(f"{PROMPT}{' '.join(argv[1:])}\n".encode())
        log.flush()
        environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "140"} | os.environ
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[held.fileno()],
            start_new_session=True,  # an interrupt reaches only the sweep, which then ends its runs
        )


def _ended(cell: Cell, code: int, seconds: float) -> Outcome:
    if code == 0 and is_finished(cell):
        return Outcome(cell=cell, state="finished", seconds=seconds, note=_result(cell))
    but = ", but summary.json does not say finished" * (code == 0)
    return Outcome(cell=cell, state="failed", seconds=seconds, note=f"exit code {code}{but}")


def _result(cell: Cell) -> str:
    summary = record.read_summary(cell.folder)
    below = summary["below_unigram"]  # None if all bytes are equal
    return f"{summary['bits_per_byte']:.3f} bits per byte" + (
        f", {100 * below:.1f} % below unigram" if below is not None else ""
    )


def _end(processes: list[subprocess.Popen[bytes]], grace: float = 40.0) -> None:
    for process in processes:
        process.terminate()  # torchrun forwards it to its ranks
    deadline = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# The program


def _show_plan(sweep: Sweep, path: str | Path, cells: Sequence[Cell]) -> None:
    ranks = f"{sweep.nproc} rank{'s' if sweep.nproc > 1 else ''}"
    where = cells[0].folder.parent
    print(f"sweep {sweep.name}: {len(cells)} runs in {where}, {sweep.parallel} at a time, {ranks} each")
    for cell in cells:
        resumes = "resume" if (cell.folder / "checkpoints").is_dir() else "run"
        also = "" if len(cell.covers) == 1 else f" (stands for {len(cell.covers)} cells)"
        print(f"  {cell.name}: {'skip, finished' if is_finished(cell) else resumes}{also}")
    print(f"first command: python {' '.join(command(sweep, path, cells[0])[1:])}")


def report(outcomes: Sequence[Outcome], seconds: float) -> int:
    """Print the end of every failed run's log and a count; return the exit code, 1 if a run failed."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        log = outcome.cell.folder / LOG
        print(f"\n{outcome.cell.name} failed ({outcome.note}); the end of {log}:")
        print(*(f"  | {line}" for line in _tail(log)), sep="\n")
    states = [outcome.state for outcome in outcomes]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("finished", "skipped", "failed"))
    print(f"\n{len(outcomes)} runs in {seconds:.0f} s: {counts}")
    print(f"next: python -m analysis.report {outcomes[0].cell.folder.parent}")
    return 1 if failed else 0


def _tail(log: Path) -> list[str]:
    """Return the last lines of the last attempt, without torchrun's own report."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    begin = max((i for i, line in enumerate(lines) if line.startswith(PROMPT)), default=0)
    own = itertools.takewhile(lambda line: "torch/distributed/elastic/" not in line, lines[begin:])
    return list(own)[-TAIL:]


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 all finished, 1 some failed, 2 not started, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m recipes.sweep", description="Train every cell of a sweep file.")
    parser.add_argument("file", help="a sweep file, such as recipes/ablations/hybrid_ratio.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="name, nproc, parallel, or a recipe key")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    chosen = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, like Ctrl-C
    started = time.monotonic()
    try:
        sweep = load(chosen.file, chosen.overrides)
        cells = plan(sweep, chosen.file)
        if chosen.dry_run:
            _show_plan(sweep, chosen.file, cells)
            return 0
        outcomes = run(sweep, chosen.file, cells, shown=" ".join(["python -m recipes.sweep", *arguments]))
        return report(outcomes, time.monotonic() - started)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the runs in flight were ended; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
