"""The speed of linear attention on the device, forward and backward, compared with fla-core and flash attention.

An ideal pass reads or writes each tensor once, keeps states on the chip and computes whole C x C tiles. With sizes K
and V, chunks of C = 64 tokens and s bytes a number, it moves and computes per head and token:

    bytes    forward    q k v (decay) in, o out                          (2K + 2V) s + 4 D
             backward   q k v do (decay) in, dq dk dv (d decay) out      (4K + 3V) s + 8 D
    FLOPs    forward    q k^T, (q k^T) v, k^T v, q S                     2 C (K + V) + 4 K V
             backward   q k^T again, do v^T, dq, dk, dv; four products
                        with states                                      2 C (3K + 2V) + 8 K V

D is the number of decays: 0, 1 or K. Causal softmax attention takes 2 (K + V) FLOPs for each pair of a query and a key
that it sees, and 2.5 times as many backward. It moves the same bytes as linear attention without decay.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from analysis.bench.device import Ceilings, ceilings, default_device
from analysis.bench.gpu import overlap_model, train_step
from analysis.bench.gpu.contenders import BOTH, FORWARD, PASSES, Contender, Forms, draw_inputs, find_contenders
from analysis.bench.result import Claim, Result, Row
from analysis.bench.sizes import QUICK, KernelSizes, Sizes
from analysis.bench.stopwatch import Budget, Stopwatch, Timed
from analysis.tables import Table
from hybrid_sp.kernels.reference.chunks import CHUNK

AGREEMENT = 2e-2  # allowed relative difference of two outputs in bf16 with the same mathematics
LONG = 32768  # tokens; from here on the higher goal applies


@dataclass(kw_only=True)
class Cell:
    """The measurements of one contender on one shape; `host` holds the seconds of its launches."""

    contender: Contender
    heads: int
    length: int
    passes: str  # one of PASSES
    values: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def name(self) -> str:
        return f"{self.contender.name}, H={self.heads}, {self.passes}"

    @property
    def seconds(self) -> float:
        return statistics.median(self.values)

    def work(self, width: int, itemsize: int) -> tuple[float, float]:
        """Return the bytes and FLOPs of an ideal pass."""
        tokens = self.heads * self.length
        D = {"scalar": 1, "vector": width}.get(self.contender.decay, 0)
        moved, computed = 4 * width * itemsize + 4 * D, 4 * CHUNK * width + 4 * width**2
        if self.passes == BOTH:
            moved += 7 * width * itemsize + 8 * D
            computed += 10 * CHUNK * width + 8 * width**2
        if self.contender.decay == "softmax":
            computed = int(4 * width * (self.length + 1) / 2 * (1 if self.passes == FORWARD else 3.5))
        return tokens * moved, tokens * computed


def kernels(sizes: Sizes, out: Path) -> Result:
    """Compare linear attention with fla-core and flash attention on a GPU, and time a 1B model's step."""
    device = default_device()
    shape = sizes.kernels if device.type == "cuda" else QUICK.kernels
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    watch = Stopwatch(device)
    limits = ceilings(watch, dtype, shape.copied, shape.side, shape.repetitions)
    contenders, notes = find_contenders(device, shape.softmax_until)
    _report_progress(f"copy {limits.copy / 1e9:,.0f} GB/s, matmul {limits.matmul / 1e12:,.1f} TFLOP/s; {notes}")
    cells: list[Cell] = []
    differences: list[Claim] = []
    steps: list[train_step.Step] = []
    phases: list[overlap_model.Phase] = []
    cut = False
    try:
        measure_operators(contenders, shape, watch, dtype, cells, differences, notes)
        _report_progress("steps of the model")
        steps = train_step.measure_steps(shape, watch, dtype, Budget(shape.seconds[2]), notes)
        _report_progress("phases of a layer")
        phases = overlap_model.measure_phases(shape, watch, dtype, Budget(shape.seconds[3]), notes)
    except SystemExit:  # by a signal: report what there is
        cut = True
        notes.append("cut: the rest was not measured")
    measured: list[Cell | train_step.Step | overlap_model.Phase] = [*cells, *steps, *phases]
    where = "" if device.type == "cuda" else ", without a CUDA device: it shows that the program works, and no more"
    return Result(
        title=(
            f"kernels, {str(dtype).removeprefix('torch.')}, B=1, K=V={shape.width}, decays in fp32; ceilings: copy "
            f"{limits.copy / 1e9:,.0f} GB/s (read + written), matmul {limits.matmul / 1e12:,.1f} TFLOP/s{where}"
        ),
        unit="seconds",
        body=[
            Table(
                header=HEADER,
                rows=tuple(operator_lines(cells, limits, shape.width, dtype.itemsize)),
                numbers=frozenset(HEADER[1:]),
            ),
            COUNTED,
            *train_step.step_table(steps, limits),
            *overlap_model.phase_tables(phases, shape),
            *(["\n".join(f"- {note}" for note in notes)] if notes else []),
        ],
        rows=[Row(contender=one.name, length=one.length, values=one.values) for one in measured],
        claims=[*goals(cells, limits, shape.width, dtype.itemsize), *differences] if device.type == "cuda" else [],
        facts={
            "ceilings": limits._asdict(),
            "peak_bytes": {f"{cell.name}, T={cell.length}": cell.peak_bytes for cell in cells},
            "steps": [step.facts() for step in steps],
            "notes": notes,
        },
        cut=cut,
    )


def _report_progress(what: str) -> None:
    """Print a line with the time, because the report comes at the end and a loan of the machine may end before."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def measure_operators(
    contenders: Sequence[Contender],
    shape: KernelSizes,
    watch: Stopwatch,
    dtype: torch.dtype,
    cells: list[Cell],
    differences: list[Claim],
    notes: list[str],
) -> None:
    """Measure every contender on every shape, in turns, and claim that peers compute the same as ours.

    It adds to the last three arguments as it goes. It drops a contender that fails, or whose turn comes after the
    budget for compiling, and adds a note. One whose backward pass alone fails is measured forward.
    """
    tuning = Budget(shape.seconds[0])
    drawn = {heads: draw_inputs(heads, shape.tuned_at, shape.width, dtype, watch.device) for heads in shape.heads}
    contenders = [
        replace(one, passes=passes)
        for one in contenders
        if (passes := _warm_up(one, [(forms[one.decay], do) for forms, do in drawn.values()], notes, tuning))
    ]
    for heads, (forms, _) in drawn.items():
        differences += _differences(contenders, forms, f"H={heads}, T={shape.tuned_at}")
    del drawn
    budget = Budget(shape.seconds[1])
    grid = [(heads, length) for length in shape.lengths for heads in shape.heads]
    for number, (heads, length) in enumerate(grid):
        if budget.over:
            notes.append(f"not measured, out of time: H={heads}, T={length}")
            continue
        forms, do = draw_inputs(heads, length, shape.width, dtype, watch.device)
        todo = [
            (Cell(contender=one, heads=heads, length=length, passes=passes), call_of(one, forms[one.decay], do, passes))
            for one in contenders
            for passes in one.passes
            if length <= (one.until or length)
        ]
        done = _measure_in_turns(todo, shape.repetitions, watch, Budget(budget.left / (len(grid) - number)), notes)
        times = (f"{cell.contender.name}, {cell.passes} {cell.seconds * 1e3:.3f} ms" for cell in done)
        _report_progress(f"H={heads}, T={length}: {'; '.join(times)}")
        cells += done
        del forms, do, todo


def call_of(one: Contender, leaves: list[Tensor], do: Tensor, passes: str) -> Timed:
    """Return a function that runs these passes of a contender."""

    def forward() -> Tensor:
        with torch.no_grad():
            return one.call(*leaves)

    return forward if passes == FORWARD else lambda: torch.autograd.grad(one.call(*leaves), leaves, do)


def _warm_up(
    one: Contender, inputs: Sequence[tuple[list[Tensor], Tensor]], notes: list[str], budget: Budget
) -> tuple[str, ...]:
    """Compile and tune a contender by its first call on each of the inputs, and return the passes that it can run."""
    for passes in (PASSES, (FORWARD,)):
        if budget.over:
            notes.append(f"not measured, out of time: {one.name}")
            return ()
        try:
            for leaves, do in inputs:
                _report_progress(f"compiling and tuning {one.name}, {passes[-1]}, H={leaves[0].shape[2]}")
                call_of(one, leaves, do, passes[-1])()
            return passes
        except Exception as error:  # a package may raise anything on this device; the others go on
            notes.append(f"failed: {one.name}, {passes[-1]}: {_first_line(error)}")
    return ()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _measure_in_turns(
    todo: list[tuple[Cell, Timed]], repetitions: int, watch: Stopwatch, budget: Budget, notes: list[str]
) -> list[Cell]:
    """Measure one shape: a round that warms up and reads the memory, then rounds until the budget ends."""
    works = []
    for cell, run in todo:
        where = f"H={cell.heads}, T={cell.length}"
        try:
            run()
            cell.peak_bytes = watch.peak_bytes(run)
            cell.host.append(watch.time(run).host)
        except Exception as error:  # such as out of memory
            notes.append(f"failed: {cell.contender.name}, {where}, {cell.passes}: {_first_line(error)}")
            continue
        works.append((cell, run))
    for repetition in range(repetitions if works else 0):
        if repetition and budget.over:
            notes.append(f"{where}: {repetition} repetitions of {repetitions} in the time there was")
            break
        for cell, run in works:
            took = watch.time(run, cell.host[-1])
            cell.values.append(took.device)
            cell.host.append(took.host)
    return [cell for cell, _ in works]


def _differences(contenders: Sequence[Contender], forms: Forms, where: str) -> Iterator[Claim]:
    """Claim a small relative difference of every peer's output from ours with the same decay."""
    with torch.no_grad():
        ours = {one.decay: one.call(*forms[one.decay]) for one in contenders if one.name.startswith("ours")}
        for one in contenders:
            if one.name.startswith("fla") and one.decay in ours:
                own, theirs = ours[one.decay].float(), one.call(*forms[one.decay]).float()
                difference = ((own - theirs).norm() / own.norm()).item()
                what = f"{one.name}, relative difference from ours, {where}"
                yield Claim(what=what, measured=difference, at_most=AGREEMENT)


HEADER = (
    "contender",
    "H",
    "T",
    "forward ms",
    "fwd + bwd ms",
    "times ours, forward",
    "fwd + bwd",
    "forward GB/s (of copy)",
    "fwd + bwd TFLOP/s (of matmul)",
    "peak MiB",
    "launching, ms",
)
COUNTED = (
    "Times are the device's, between events, medians of turns. Times ours: over ours with the same decay (of flash "
    f"attention, the scalar one). GB/s count each input and output once; FLOPs those of chunks of {CHUNK} tokens "
    "(analysis/bench/gpu/operators.py). Peak: memory that forward + backward need on top of their inputs. Launching: "
    "what forward + backward take the host."
)


def operator_lines(cells: list[Cell], limits: Ceilings, width: int, itemsize: int) -> Iterator[tuple[str, ...]]:
    """Yield a line under HEADER for each contender and shape with a measurement of the forward pass."""
    by_place = {(c.contender.name, c.heads, c.length, c.passes): c for c in cells}
    for cell in cells:
        name, place = cell.contender.name, (cell.heads, cell.length)
        both = by_place.get((name, *place, BOTH))
        if cell.passes != FORWARD:
            continue
        decay = "scalar" if cell.contender.decay == "softmax" else cell.contender.decay
        ours = [by_place.get((f"ours, {decay}", *place, passes)) for passes in PASSES]
        moved = cell.work(width, itemsize)[0] / cell.seconds
        times = [f"{c.seconds * 1e3:.3f}" if c else "" for c in (cell, both)]
        ratios = [
            f"{c.seconds / own.seconds:.2f}" if c and own else "" for c, own in zip((cell, both), ours, strict=True)
        ]
        shared = (name, *map(str, place), *times, *ratios, f"{moved / 1e9:,.0f} ({moved / limits.copy:.0%})")
        if both is None:
            yield (*shared, "", "", "")
            continue
        computed = both.work(width, itemsize)[1] / both.seconds
        yield (
            *shared,
            f"{computed / 1e12:,.1f} ({computed / limits.matmul:.0%})",
            f"{both.peak_bytes / 2**20:,.0f}",
            f"{statistics.median(both.host) * 1e3:.2f}",
        )


def goals(cells: list[Cell], limits: Ceilings, width: int, itemsize: int) -> Iterator[Claim]:
    """Claim the goals on an H200, each on the shape with the worst ratio."""
    seconds = {(c.contender.name, c.heads, c.length, c.passes): c.seconds for c in cells}

    def worst(ratios: dict[str, float], what: str, bound: float) -> Iterator[Claim]:
        if ratios:
            where = min(ratios, key=ratios.__getitem__)
            yield Claim(what=f"{what}; worst at {where}", measured=ratios[where], at_least=bound)

    for passes, bound, longer in ((FORWARD, 1.0, 0), (BOTH, 1.0, 0), (BOTH, 1.3, LONG)):
        ratios = {
            f"H={heads}, T={length}": value / seconds["ours, scalar", heads, length, passes]
            for (name, heads, length, measured), value in seconds.items()
            if name == "fla chunk_simple_gla"
            and measured == passes
            and length >= longer
            and ("ours, scalar", heads, length, passes) in seconds
        }
        range_of = f", T >= {longer // 1024}K" if longer else ""
        yield from worst(ratios, f"scalar decay, times faster than fla-core, {passes}{range_of}", bound)
    for decay in ("none", "fixed", "scalar"):
        shares = {
            f"H={c.heads}, T={c.length}": c.work(width, itemsize)[0] / c.seconds / limits.copy
            for c in cells
            if c.contender.name == f"ours, {decay}" and c.passes == FORWARD
        }
        missed = {"no shape: it failed": float("nan")}
        yield from worst(shares or missed, f"{decay} decay, forward bytes/s over the copy's", 0.5)
