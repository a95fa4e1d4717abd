"""The comparison of strategies: the cost of the same training under each of them, and the differences of its losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from statistics import median

from analysis import traffic
from analysis.points import Point
from analysis.runs import Run, TrainPoint
from analysis.tables import Table

WARM = 3  # steps that a median leaves out, if a run has more
NUMBERS = (
    "tokens/s",
    "exposed (ms)",
    "calls",
    "linear (bytes)",
    "softmax (bytes)",
    "exchanges (bytes)",
    "exchanges (model)",
    "memory (MB)",
    "loss (bits/byte)",
)
LEGEND = (
    "Speed, time exposed (rank 0 stands still for others), calls and received bytes are medians of the steps after "
    f"the first {WARM}, on rank 0; exchanges are those of linear, softmax and convolution layers; memory is the peak."
)
ABSENT = "not recorded"
ROUNDING = 1e-3, 1e-2  # runs of one training may differ by these parts of the first and of the final loss


def table(points: Sequence[Point]) -> Table:
    """Return a row per point: strategy, speed and communication of the median step on rank 0, memory and loss.

    The table names the mixers only if they differ. It prints "not recorded" for a number that an older run lacks.
    """
    mixed = len({(point.linear, point.softmax) for point in points}) > 1
    rows = []
    for point in points:
        mixers = (point.linear or "none (all softmax)", str(point.softmax)) if mixed else ()
        peaks = [row.memory_mb for run in point.runs for row in run.train if row.memory_mb is not None]
        rows.append(
            (
                *point.strategy.values(),
                *mixers,
                f"{speed(point):,.0f}",
                f"{exposed(point):.2f}",
                _text(_median(point, lambda row: row.calls)),
                _text(_median(point, lambda row: row.received_by_kind.get("linear"))),
                _text(_median(point, lambda row: row.received_by_kind.get("softmax"))),
                _text(_median(point, lambda row: sum(row.received_by_kind.values()) if row.received_by_kind else None)),
                f"{traffic.exchanged(point.runs[0]):,}",
                _text(max(peaks, default=None)),
                f"{point.bits_per_byte:.4f}",
            )
        )
    words = (*points[0].strategy, *(("linear blocks", "softmax share") if mixed else ()))
    return Table(header=(*words, *NUMBERS), rows=tuple(rows), numbers=frozenset(NUMBERS))


def speed(point: Point) -> float:
    """Return the tokens per second of the median step."""
    return _median(point, lambda row: row.tokens_per_second) or 0.0


def exposed(point: Point) -> float:
    """Return the milliseconds of the median step in which rank 0 waited for other ranks."""
    return _median(point, lambda row: row.exposed_ms) or 0.0


def _median(point: Point, number: Callable[[TrainPoint], float | None]) -> float | None:
    values = [number(row) for run in point.runs for row in run.train[WARM:] or run.train]
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _text(number: float | None) -> str:
    return ABSENT if number is None else f"{number:,.0f}"


def sameness(runs: Sequence[Run]) -> str:
    """Write the sentence on the largest difference of losses between runs that differ in strategy alone."""
    models: dict[tuple[str | None, Fraction, int], list[Run]] = {}
    for run in runs:
        models.setdefault((run.linear, run.softmax, run.seed), []).append(run)
    groups = [group for group in models.values() if len(group) > 1]
    if not groups:
        return "No model has one seed under two strategies, so nothing here says whether their training is the same."
    first = max(_spread([run.train[0].loss / math.log(2) for run in group]) for group in groups)
    final = max(_spread([run.bits_per_byte for run in group]) for group in groups)
    sums = f"the first step's losses differ by at most {first:.2g} bits per byte, the final ones by {final:.2g}"
    lowest = min(run.train[0].loss / math.log(2) for run in runs), min(run.bits_per_byte for run in runs)
    if first > ROUNDING[0] * lowest[0] or final > ROUNDING[1] * lowest[1]:
        return f"Strategies are to compute the same training up to rounding, but these did not: {sums}."
    return f"All strategies compute the same training up to rounding: {sums}; which strategy's is lowest is chance."


def _spread(numbers: Sequence[float]) -> float:
    return max(numbers) - min(numbers)
