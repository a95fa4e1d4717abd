"""The choice of launch parameters: it times a few for every kernel of linear attention, and fills the table.

1. A call with every decay, launching nothing, tells which entries of `hybrid_sp/kernels/gpu/tuning.py` it asks for.
2. Processes of their own, several at once, make the call with every candidate of an entry. Their kernels are then
   compiled, into Triton's cache, and candidates that fail or compute something else are out.
3. This process times the call, forward and backward, with every candidate left, in turns, entry after entry. One
   replaces the default if it is faster by more than times vary.

On a device the choice goes into the table, by architecture. What is chosen so far is all the time in tuned.json of the
results, which has the form of the table.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from analysis.bench.device import allow_any_triton, default_device
from analysis.bench.gpu.contenders import Forms, draw_inputs, find_contenders
from analysis.bench.gpu.interception import in_place_of_launch
from analysis.bench.result import Result, Row
from analysis.bench.sizes import QUICK, KernelSizes, Sizes
from analysis.bench.stopwatch import Budget, Stopwatch
from analysis.tables import Table
from hybrid_sp.backends import interpreted
from hybrid_sp.kernels.gpu import tuning
from hybrid_sp.kernels.gpu.tuning import Entry

ROOT = Path(__file__).parents[3]
DECAYS = ("scalar", "none", "vector")  # a fixed decay launches what a scalar one does
AGREEMENT = 1e-2  # allowed relative difference from the results with the default, in bf16
WORTH = 0.98  # the time of a better candidate, at most, over that of the default
TRIED_ON = 8  # a candidate is tried on this part of the tokens
TRYING = 2 / 3  # of the time that is left, for the second step at most
WORKERS = 8  # processes that compile; a host with fewer cores has as many as cores

Call = Callable[[], list[Tensor]]


@dataclass(kw_only=True)
class Trial:
    """The candidate of an entry; `refused` is the reason why it may not win, and `values` holds its seconds."""

    key: str
    decay: str
    entry: Entry
    refused: str = ""
    values: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.values)

    @property
    def words(self) -> str:
        """The parameters that the entry has, such as "columns 64, warps 4, stages 2"."""
        return ", ".join(f"{name} {value}" for name, value in self.entry._asdict().items() if value)


def call_of(decay: str, forms: Forms, do: Tensor) -> Call:
    """Return a call of linear attention with this decay that returns output and gradients."""
    ours, _ = find_contenders(do.device, 0)
    operator = next(one.call for one in ours if one.decay == decay)
    leaves = forms[decay]

    def run() -> list[Tensor]:
        o = operator(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    return run


def asked(run: Call) -> dict[str, Entry]:
    """Return the entries that a call asks for, by key, without launching its kernels."""
    with in_place_of_launch(lambda *_, **__: None), tuning.watching() as found:
        run()
    return dict(found)


def try_out(run: Call, key: str, entries: Sequence[Entry]) -> list[str]:
    """Return for each entry of a key why it may not win, or "" if it may; the first one is the default."""
    told, want = [], None
    for entry in entries:
        try:
            with tuning.trying({key: entry}):
                found = run()
            want = want or found
            told.append(_difference(found, want))
        except Exception as error:  # of the compiler or the device: any of them rules this candidate out
            told.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200])
    return told


def _difference(found: Sequence[Tensor], want: Sequence[Tensor]) -> str:
    for name, a, b in zip(("o", "dq", "dk", "dv", "dg"), found, want, strict=False):
        off = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if not off <= AGREEMENT:
            return f"{name} differs by {off:.2g} from the default's"
    return ""


def choose(trials: Sequence[Trial], run: Call, best: Mapping[str, Entry], watch: Any, repetitions: int) -> Trial:
    """Time the candidates of one entry in turns, beside the best of other entries, and return the one to use."""
    fit = [one for one in trials if not one.refused]
    launching: dict[int, float] = {}
    for repetition in range(-1, repetitions if len(fit) > 1 else -1):
        for i, one in enumerate(fit):
            with tuning.trying({**best, one.key: one.entry}):
                took = watch.time(run, launching.get(i, 0.0))
            launching[i] = took.host
            if repetition >= 0:
                one.values.append(took.device)
    default = trials[0]
    if len(fit) < 2 or default.refused:
        return default
    fastest = min(fit, key=lambda one: one.seconds)
    return fastest if fastest.seconds <= WORTH * default.seconds else default


def tune(sizes: Sizes, out: Path) -> Result:
    """Time five launch parameters of every kernel, and fill the table of launches on a device."""
    device = default_device()
    shape = sizes.kernels if device.type == "cuda" else QUICK.kernels
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    watch, budget = Stopwatch(device), Budget(shape.tuning_seconds)
    best: dict[str, Entry] = {}
    done: list[Trial] = []
    notes: list[str] = []
    runs_here = importlib.util.find_spec("triton") is not None and (device.type == "cuda" or interpreted())
    for width in shape.tuned_widths if runs_here else ():
        tune_width(width, shape, dtype, watch, budget, out, best, done, notes)
    if device.type == "cuda" and best:
        tuning.write(tuning.architecture_of(device), best)
        notes.append(f"written to {tuning.TABLE.name}: {len(best)} entries of {tuning.architecture_of(device)}")
    if not done:
        notes.append("nothing to tune: none of our kernels can run here")
    return Result(
        title=f"launch parameters, {str(dtype).removeprefix('torch.')}, B=1, H={shape.heads[0]}, T={shape.tuned_at}",
        unit="seconds",
        body=[
            Table(header=HEADER, rows=tuple(_lines(done, best)), numbers=frozenset({"ms", "over the default"})),
            "Times are those of the whole call, forward and backward.",
            *(["\n".join(f"- {note}" for note in notes)] if notes else []),
        ],
        rows=[
            Row(contender=f"{one.key}: {one.words}", length=shape.tuned_at, values=one.values)
            for one in done
            if one.values
        ],
        claims=[],
        facts={"chosen": _as_json(best), "notes": notes},
    )


HEADER = ("entry", "candidate", "ms", "over the default", "outcome")


def _lines(done: Sequence[Trial], best: Mapping[str, Entry]) -> Iterator[tuple[str, ...]]:
    """Yield a line under HEADER for each candidate."""
    defaults = {one.key: one for one in reversed(done)}
    for one in done:
        default = defaults[one.key]
        ratio = f"{one.seconds / default.seconds:.3f}" if one.values and default.values else ""
        outcome = one.refused or ("chosen" if best.get(one.key) == one.entry else "")
        yield one.key, one.words, f"{one.seconds * 1e3:.3f}" if one.values else "", ratio, outcome


def tune_width(
    width: int,
    shape: KernelSizes,
    dtype: torch.dtype,
    watch: Any,
    budget: Budget,
    out: Path,
    best: dict[str, Entry],
    done: list[Trial],
    notes: list[str],
) -> None:
    """Choose all entries that calls of this width ask for, as long as the budget lasts; adds to the last three."""
    device, heads = watch.device, shape.heads[0]
    forms, do = draw_inputs(heads, shape.tuned_at, width, dtype, device)
    runs = {decay: call_of(decay, forms, do) for decay in DECAYS}
    questions: dict[str, tuple[str, Entry]] = {}
    for decay, run in runs.items():
        for key, entry in asked(run).items():
            questions.setdefault(key, (decay, entry))
    trials = {
        key: [Trial(key=key, decay=decay, entry=one) for one in tuning.candidates(key, entry)]
        for key, (decay, entry) in questions.items()
        if key not in best
    }
    if device.type == "cuda":
        _try_in_processes(list(trials.values()), heads, shape.tuned_at // TRIED_ON, width, Budget(budget.left * TRYING))
    else:
        for group in trials.values():
            _note_refused(group, try_out(runs[group[0].decay], group[0].key, [one.entry for one in group]))
    for key, group in trials.items():
        done += group
        if budget.over:
            notes.append(f"not measured, out of time: {key}")
            continue
        best[key] = choose(group, runs[group[0].decay], best, watch, shape.repetitions).entry
        chosen = {tuning.architecture_of(device): _as_json(best)}
        (out / "tuned.json").write_text(json.dumps(chosen, indent=1) + "\n")


def _as_json(entries: Mapping[str, Entry]) -> dict[str, dict[str, int]]:
    return {key: {name: n for name, n in entry._asdict().items() if n} for key, entry in entries.items()}


def _note_refused(group: Sequence[Trial], told: Sequence[str]) -> None:
    for one, words in zip(group, [*told, *["its process ended"] * len(group)], strict=False):
        one.refused = words


def _try_in_processes(groups: list[list[Trial]], heads: int, length: int, width: int, budget: Budget) -> None:
    """Run each group in a process of its own, which the device may end; what is late is refused."""
    waiting = list(groups)
    running: list[tuple[list[Trial], subprocess.Popen[bytes], IO[str]]] = []
    limit = min(WORKERS, os.cpu_count() or 1)
    while waiting or running:
        while waiting and len(running) < limit and not budget.over:
            group = waiting.pop(0)
            question = [group[0].decay, group[0].key, heads, length, width, [one.entry for one in group]]
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (until it is read)
            command = [sys.executable, "-m", __name__, json.dumps(question)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.DEVNULL)
            running.append((group, process, output))
        if budget.over:
            for group in waiting:
                _note_refused(group, ["not tried, out of time"] * len(group))
            waiting = []
            for _, process, _ in running:
                process.kill()
        running = [one for one in running if not _finished(*one)]


def _finished(group: list[Trial], process: subprocess.Popen[bytes], output: IO[str]) -> bool:
    """Wait a moment for a process, and note what it has told if it has ended."""
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        return False
    output.seek(0)
    _note_refused(group, [json.loads(line) for line in output.read().splitlines()])
    output.close()
    return True


def _answer(question: str) -> None:
    """Run the candidates of one entry in this process, and print a line for each."""
    allow_any_triton()
    decay, key, heads, length, width, entries = json.loads(question)
    forms, do = draw_inputs(heads, length, width, torch.bfloat16, torch.device("cuda"))
    run, want = call_of(decay, forms, do), Entry(*entries[0])
    for entry in entries:  # one by one, since the device may end this process
        print(json.dumps(try_out(run, key, [want, Entry(*entry)])[-1]), flush=True)


if __name__ == "__main__":
    _answer(sys.argv[1])
