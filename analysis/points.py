"""The points of an experiment: runs grouped by the model that they train, and the tables of their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from analysis.runs import Run, strategies, value_of
from analysis.tables import Table


@dataclass(frozen=True, kw_only=True)
class Point:
    """The runs of one model, one for each seed.

    linear         the kind of its linear blocks; None if there are none
    softmax        the share of softmax blocks
    strategy       the strategy keys whose values differ between points, with their values here; often empty
    axes           the values of everything else that a sweep varies
    bits_per_byte  the mean over seeds; low and high are its extremes
    loss           the mean in nats per byte
    """

    linear: str | None
    softmax: Fraction
    runs: tuple[Run, ...]
    strategy: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)

    @property
    def bits_per_byte(self) -> float:
        return sum(run.bits_per_byte for run in self.runs) / len(self.runs)

    @property
    def loss(self) -> float:
        return sum(run.loss for run in self.runs) / len(self.runs)

    @property
    def low(self) -> float:
        return min(run.bits_per_byte for run in self.runs)

    @property
    def high(self) -> float:
        return max(run.bits_per_byte for run in self.runs)

    @property
    def below_unigram(self) -> float:
        return sum(run.below_unigram for run in self.runs) / len(self.runs)


def group_runs(runs: Sequence[Run], axes: Sequence[str] = ()) -> list[Point]:
    """Group runs by kind of linear mixer, share of softmax blocks, strategy and the values of `axes`.

    The points are sorted by the first two; pure softmax comes last. Raises ValueError if two runs of one point have the
    same seed, because then something else differs and a mean would hide it.
    """
    Values = tuple[tuple[str, str], ...]
    groups: dict[tuple[str | None, Fraction, Values, Values], list[Run]] = {}
    for run, strategy in zip(runs, strategies(runs), strict=True):
        values = tuple((axis, value_of(run, axis)) for axis in axes)
        groups.setdefault((run.linear, run.softmax, tuple(strategy.items()), values), []).append(run)
    for members in groups.values():
        seeds = [run.seed for run in members]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(run.name for run in members)
            raise ValueError(
                f"runs {names} have the same mixers, strategy and seed {seeds}; report them from separate folders"
            )
    points = [
        Point(
            linear=linear,
            softmax=softmax,
            strategy=dict(strategy),
            axes=dict(values),
            runs=tuple(sorted(members, key=lambda run: run.seed)),
        )
        for (linear, softmax, strategy, values), members in groups.items()
    ]
    return sorted(points, key=lambda point: (point.linear is None, point.linear or "", point.softmax))


def kinds(found: Sequence[Point]) -> list[str]:
    """Return the kinds of linear mixers among the points, in order."""
    return list(dict.fromkeys(point.linear for point in found if point.linear is not None))


def loss_table(found: Sequence[Point]) -> Table:
    """Return a row per point: loss in nats and bits per byte, margin to the unigram entropy, seeds and their spread."""
    rows = [
        (
            *point.strategy.values(),
            *point.axes.values(),
            str(point.softmax),
            point.linear or "none (all softmax)",
            point.runs[0].pattern,
            f"{point.loss:.4f}",
            f"{point.bits_per_byte:.4f}",
            f"{100 * point.below_unigram:.1f} %",
            str(len(point.runs)),
            f"{point.low:.4f} to {point.high:.4f}" if len(point.runs) > 1 else "",
            f"{point.runs[0].parameters:,}",
            f"{sum(run.seconds for run in point.runs) / len(point.runs):.0f}",
        )
        for point in found
    ]
    header = (
        "softmax share",
        "linear blocks",
        "pattern",
        "loss (nats/byte)",
        "loss (bits/byte)",
        "below unigram",
        "seeds",
        "lowest to highest (bits/byte)",
        "parameters",
        "seconds per run",
    )
    numbers = frozenset({*header} - {"linear blocks", "pattern"})
    return Table(header=(*found[0].strategy, *found[0].axes, *header), rows=tuple(rows), numbers=numbers)


def ratio_table(found: Sequence[Point]) -> Table:
    """Return the bits per byte, with one row per kind of linear mixer and one column per share of softmax blocks."""
    shares = sorted({point.softmax for point in found})
    value = {(point.linear, point.softmax): f"{point.bits_per_byte:.3f}" for point in found}
    header = ("bits per byte at softmax share", *map(str, shares))
    rows = [
        (kind, *(value.get((kind, share)) or value.get((None, share), "not run") for share in shares))
        for kind in kinds(found)
    ]
    return Table(header=header, rows=tuple(rows), numbers=frozenset(map(str, shares)))


def run_table(runs: Sequence[Run]) -> Table:
    """Return a row per run, with raw numbers and the commit."""
    rows = [
        (
            run.name,
            run.linear or "",
            str(run.softmax),
            run.pattern,
            str(run.seed),
            str(run.steps),
            str(run.tokens),
            repr(run.loss),
            repr(run.bits_per_byte),
            repr(run.unigram_bits_per_byte),
            repr(run.below_unigram),
            str(run.parameters),
            repr(run.seconds),
            str(run.provenance.get("commit", "")),
        )
        for run in runs
    ]
    header = (
        "run",
        "linear",
        "softmax_share",
        "pattern",
        "seed",
        "steps",
        "tokens",
        "loss_nats_per_byte",
        "bits_per_byte",
        "unigram_bits_per_byte",
        "below_unigram",
        "parameters",
        "seconds",
        "commit",
    )
    return Table(header=header, rows=tuple(rows))
