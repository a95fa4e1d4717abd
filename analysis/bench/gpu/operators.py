"""Linear attention on the device, forward and backward, beside fla-core's kernels and torch's flash attention.

What an ideal pass moves and computes, of one head and token, with sizes K and V, chunks of C = 64 tokens, s bytes a
number of the model's dtype and 4 of a decay; each tensor read or written once, whole C x C tiles, states on the chip:

    bytes    forward    q k v (decay) in, o out                          (2K + 2V) s + 4 D
             backward   q k v do (decay) in, dq dk dv (d decay) out      (4K + 3V) s + 8 D
    FLOPs    forward    q k^T, (q k^T) v, k^T v, q S                     2 C (K + V) + 4 K V
             backward   q k^T again, do v^T, dq, dk, dv; four products
                        with states                                      2 C (3K + 2V) + 8 K V

D numbers of decay: 0, 1 or K. Of softmax attention with a causal mask: 2 (K + V) FLOPs a pair of tokens that see each
other, and 2.5 times that backward; its bytes as those of no decay.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from analysis.bench.device import Budget, Ceilings, Stopwatch, ceilings, default_device
from analysis.bench.gpu import overlap_model as hiding
from analysis.bench.gpu import train_step as rank_step
from analysis.bench.gpu.compiling import compile_ahead, tune_quickly
from analysis.bench.gpu.contenders import Contender, Forms, found, inputs
from analysis.bench.measure import QUICK, Claim, KernelSizes, Result, Row, Sizes
from hybrid_sp.kernels.reference.chunks import CHUNK

WAYS = ("forward", "forward + backward")
AGREEMENT = 2e-2  # relative difference of two outputs in bf16 that are the same mathematics
LONG = 32768  # tokens from which the goal is the higher one


@dataclass(kw_only=True)
class Cell:
    """One contender on one shape in one way; `host` is what its launches took."""

    contender: Contender
    heads: int
    length: int
    way: str
    values: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def seconds(self) -> float:
        return statistics.median(self.values)

    def work(self, width: int, itemsize: int) -> tuple[float, float]:
        """Bytes and FLOPs of an ideal pass."""
        tokens = self.heads * self.length
        D = {"scalar": 1, "vector": width}.get(self.contender.decay, 0)
        moved, computed = 4 * width * itemsize + 4 * D, 4 * CHUNK * width + 4 * width**2
        if self.way != "forward":
            moved += 7 * width * itemsize + 8 * D
            computed += 10 * CHUNK * width + 8 * width**2
        if self.contender.decay == "softmax":
            computed = int(4 * width * (self.length + 1) / 2 * (1 if self.way == "forward" else 3.5))
        return tokens * moved, tokens * computed


def kernels(sizes: Sizes, out: Path) -> Result:
    """Operators, a rank's step, and what its exchange would leave to wait for, on the device of this process."""
    device = default_device()
    shape = sizes.kernels if device.type == "cuda" else QUICK.kernels
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    watch = Stopwatch(device)
    limits = ceilings(watch, dtype, shape.copied, shape.side, shape.repetitions)
    if device.type == "cuda":
        tune_quickly()
        compile_ahead(shape, Budget(shape.seconds[0]))
    contenders, notes = found(device, shape.softmax_until)
    say(f"copy {limits.copy / 1e9:,.0f} GB/s, matmul {limits.matmul / 1e12:,.1f} TFLOP/s; {'; '.join(notes)}")
    cells, differences = measured(contenders, shape, watch, dtype, Budget(shape.seconds[1]), notes)
    say("steps of the model")
    steps = rank_step.steps(shape, watch, dtype, Budget(shape.seconds[2]), notes)
    say("phases of a layer")
    phases = hiding.phases(shape, watch, dtype, Budget(shape.seconds[3]), notes)
    where = "" if device.type == "cuda" else ", without a CUDA device: it shows that the program works, and no more"
    lines = [*operator_lines(cells, limits, shape.width, dtype.itemsize), COUNTED]
    lines += rank_step.lines(steps, limits) + hiding.lines(phases, shape) + _said(notes)
    rows = [_row(f"{c.contender.name}, H={c.heads}, {c.way}", c.length, c.values) for c in cells]
    rows += [_row(step.name, step.length, step.values) for step in steps]
    rows += [_row(phase.name, phase.length, phase.values) for phase in phases]
    return Result(
        title=(
            f"kernels, {str(dtype).removeprefix('torch.')}, B=1, K=V={shape.width}, decays in fp32; ceilings: copy "
            f"{limits.copy / 1e9:,.0f} GB/s (read + written), matmul {limits.matmul / 1e12:,.1f} TFLOP/s{where}"
        ),
        unit="seconds",
        header=HEADER,
        lines=lines,
        rows=rows,
        claims=[*goals(cells, limits, shape.width, dtype.itemsize), *differences] if device.type == "cuda" else [],
        facts={
            "ceilings": limits._asdict(),
            "peak_bytes": {f"{c.contender.name}, H={c.heads}, {c.way}, T={c.length}": c.peak_bytes for c in cells},
            "steps": [step.facts() for step in steps],
            "notes": notes,
        },
    )


def say(what: str) -> None:
    """How far it is: the report comes at the end, and the time may be up before."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _row(name: str, length: int, values: list[float]) -> Row:
    return Row(contender=name, length=length, values=values)


def _said(notes: list[str]) -> list[str]:
    return ["", *(f"- {note}" for note in notes)] if notes else []


# -- measuring --------------------------------------------------------------------------------------------------------


def measured(
    contenders: list[Contender],
    shape: KernelSizes,
    watch: Stopwatch,
    dtype: torch.dtype,
    budget: Budget,
    notes: list[str],
) -> tuple[list[Cell], list[Claim]]:
    """Every contender on every shape, taking turns, and how much their outputs differ. A contender that fails is noted
    and left out."""
    grid = [(heads, length) for length in shape.lengths for heads in shape.heads]
    cells: list[Cell] = []
    differences: list[Claim] = []
    for heads in shape.heads:  # peers choose their configurations at the first length that they see
        forms, do = inputs(heads, shape.tuned_at, shape.width, dtype, watch.device)
        say(f"compiling and tuning, H={heads}")
        contenders = [one for one in contenders if _works(one, forms[one.decay], do, notes, budget)]
        differences += _differences(contenders, forms, heads, shape.tuned_at)
        del forms, do
    for number, (heads, length) in enumerate(grid):
        if budget.over:
            notes.append(f"not measured, out of time: H={heads}, T={length}")
            continue
        here = Budget(budget.left / (len(grid) - number))
        forms, do = inputs(heads, length, shape.width, dtype, watch.device)
        now = [one for one in contenders if length <= (one.until or length)]
        done = _turns(now, forms, do, (heads, length), shape.repetitions, watch, here, notes)
        times = (f"{c.contender.name}, {c.way} {c.seconds * 1e3:.3f} ms" for c in done)
        say(f"H={heads}, T={length}: {'; '.join(times)}")
        cells += done
        del forms, do
    return cells, differences


def _run(one: Contender, leaves: list[Tensor], do: Tensor, way: str) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return one.call(*leaves)

    return forward if way == "forward" else lambda: torch.autograd.grad(one.call(*leaves), leaves, do)


def _works(one: Contender, leaves: list[Tensor], do: Tensor, notes: list[str], budget: Budget) -> bool:
    """Warms up, which compiles."""
    if budget.over:
        notes.append(f"not measured, out of time: {one.name}")
        return False
    try:
        _run(one, leaves, do, "forward + backward")()
    except Exception as error:  # whatever a package raises on this device: the others go on
        notes.append(f"failed: {one.name}: {_first_line(error)}")
        return False
    return True


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _turns(
    contenders: list[Contender],
    forms: Forms,
    do: Tensor,
    place: tuple[int, int],
    repetitions: int,
    watch: Stopwatch,
    budget: Budget,
    notes: list[str],
) -> list[Cell]:
    """One shape: a round that warms up and reads the memory, then rounds until all are done or the time is over."""
    heads, length = place
    cells = []
    for one in contenders:
        for way in WAYS:
            run = _run(one, forms[one.decay], do, way)
            cell = Cell(contender=one, heads=heads, length=length, way=way)
            try:
                run()
                cell.peak_bytes = watch.peak_bytes(run)
                cell.host.append(watch.time(run).host)
            except Exception as error:  # out of memory, say
                notes.append(f"failed: {one.name}, H={heads}, T={length}, {way}: {_first_line(error)}")
                continue
            cells.append((cell, run))
    for repetition in range(repetitions):
        if repetition and budget.over:
            notes.append(f"H={heads}, T={length}: {repetition} repetitions of {repetitions} in the time there was")
            break
        for cell, run in cells:
            took = watch.time(run, cell.host[-1])
            cell.values.append(took.device)
            cell.host.append(took.host)
    return [cell for cell, _ in cells]


def _differences(contenders: list[Contender], forms: Forms, heads: int, length: int) -> Iterator[Claim]:
    """Relative difference of every peer's output from ours of the same decay: is it the same mathematics?"""
    with torch.no_grad():
        ours = {one.decay: one.call(*forms[one.decay]) for one in contenders if one.name.startswith("ours")}
        for one in contenders:
            if one.name.startswith("fla") and one.decay in ours:
                mine, theirs = ours[one.decay].float(), one.call(*forms[one.decay]).float()
                what = f"{one.name}, relative difference from ours, H={heads}, T={length}"
                difference = ((mine - theirs).norm() / mine.norm()).item()
                yield Claim(what=what, measured=difference, at_most=AGREEMENT)


# -- telling ----------------------------------------------------------------------------------------------------------

HEADER = (
    "| contender | H | T | forward ms | fwd + bwd ms | times ours, forward | fwd + bwd | forward GB/s (of copy) "
    "| fwd + bwd TFLOP/s (of matmul) | peak MiB | launching, ms |\n" + "|---" * 11 + "|"
)
COUNTED = (
    "\nTimes are the device's, between events, medians of turns. Times ours: over ours with the same decay (of flash "
    f"attention, the scalar one). GB/s count each input and output once; FLOPs those of chunks of {CHUNK} tokens "
    "(analysis/bench/gpu/operators.py). Peak: memory that forward + backward need on top of their inputs. Launching: "
    "what forward + backward take the host."
)


def operator_lines(cells: list[Cell], limits: Ceilings, width: int, itemsize: int) -> Iterator[str]:
    """One line for each contender and shape; "times ours" is its time over that of ours with the same decay."""
    by_place = {(c.contender.name, c.heads, c.length, c.way): c for c in cells}
    for cell in cells:
        name, place = cell.contender.name, (cell.heads, cell.length)
        both = by_place.get((name, *place, WAYS[1]))
        if cell.way != WAYS[0] or both is None:
            continue
        mine = "scalar" if cell.contender.decay == "softmax" else cell.contender.decay
        ours = [by_place.get((f"ours, {mine}", *place, way)) for way in WAYS]
        times = [f"{c.seconds / own.seconds:.2f}" if own else "" for c, own in zip((cell, both), ours, strict=True)]
        moved = cell.work(width, itemsize)[0] / cell.seconds
        computed = both.work(width, itemsize)[1] / both.seconds
        yield (
            f"| {name} | {cell.heads} | {cell.length} | {cell.seconds * 1e3:.3f} | {both.seconds * 1e3:.3f} | "
            f"{' | '.join(times)} | {moved / 1e9:,.0f} ({moved / limits.copy:.0%}) | "
            f"{computed / 1e12:,.1f} ({computed / limits.matmul:.0%}) | {both.peak_bytes / 2**20:,.0f} | "
            f"{statistics.median(both.host) * 1e3:.2f} |"
        )


def goals(cells: list[Cell], limits: Ceilings, width: int, itemsize: int) -> Iterator[Claim]:
    """The goals on an H200, each held on the shape that is the furthest from it."""
    seconds = {(c.contender.name, c.heads, c.length, c.way): c.seconds for c in cells}

    def worst(ratios: dict[str, float], what: str, bound: float) -> Iterator[Claim]:
        if ratios:
            where = min(ratios, key=ratios.__getitem__)
            yield Claim(what=f"{what}; worst at {where}", measured=ratios[where], at_least=bound)

    for way, bound, longer in ((WAYS[0], 1.0, 0), (WAYS[1], 1.0, 0), (WAYS[1], 1.3, LONG)):
        ratios = {
            f"H={heads}, T={length}": value / seconds["ours, scalar", heads, length, way]
            for (name, heads, length, here), value in seconds.items()
            if name == "fla chunk_simple_gla"
            and here == way
            and length >= longer
            and ("ours, scalar", heads, length, way) in seconds
        }
        range_of = f", T >= {longer // 1024}K" if longer else ""
        yield from worst(ratios, f"scalar decay, times faster than fla-core, {way}{range_of}", bound)
    for decay in ("none", "fixed", "scalar"):
        shares = {
            f"H={c.heads}, T={c.length}": c.work(width, itemsize)[0] / c.seconds / limits.copy
            for c in cells
            if c.contender.name == f"ours, {decay}" and c.way == WAYS[0]
        }
        missed = {"no shape: it failed": float("nan")}
        yield from worst(shares or missed, f"{decay} decay, forward bytes/s over the copy's", 0.5)
