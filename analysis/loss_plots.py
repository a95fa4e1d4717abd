"""The figures of losses: against the share of softmax blocks, by kind of block, and over the training text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plots
from analysis.points import Point, kinds
from analysis.runs import Run, TrainPoint

ABREAST = 4  # columns of loss curves in one row
BINS = 25  # windows over a run; the figure averages the training loss in each


@rc_context(plots.STYLE)
def loss_against_ratio(points: Sequence[Point]) -> bytes:
    """Draw validation loss against the share of softmax blocks, a line per kind of linear block.

    The pure softmax model has no linear block, so it is a horizontal reference. Bars span lowest and highest seed.
    """
    mixed = [point for point in points if point.linear is not None]
    pure = [point for point in points if point.linear is None]
    shares = sorted({point.softmax for point in mixed})
    figure = Figure(figsize=(6.6, 4.3), layout="constrained")
    axes = figure.add_subplot()
    for kind, look in zip(kinds(mixed), plots.looks(len(kinds(mixed))), strict=True):
        _line_with_spread(axes, [point for point in mixed if point.linear == kind], shares, kind, look)
    for point in pure:
        seeds = f", mean of {len(point.runs)} seeds" if len(point.runs) > 1 else ""
        label = f"softmax in every block{seeds} ({point.bits_per_byte:.3f})"
        axes.axhline(
            point.bits_per_byte, color=plots.SOFTMAX.color, linestyle=plots.SOFTMAX.line, linewidth=1.3, label=label
        )
        if len(point.runs) > 1:
            axes.axhspan(point.low, point.high, color="0.85", zorder=0)
    ends = {Fraction(0): "0\n(all linear)", Fraction(1): "1\n(all softmax)"}
    axes.set_xticks(range(len(shares)), [ends.get(share, str(share)) for share in shares])
    axes.set_xlim(-0.4, max(len(shares) - 1, 0) + 0.4)
    axes.set(xlabel="softmax blocks / all blocks", ylabel="validation loss (bits per byte)")
    axes.margins(y=0.12)
    as_nats_and_back = (lambda bits: bits * math.log(2), lambda nats: nats / math.log(2))
    nats = axes.secondary_yaxis("right", functions=as_nats_and_back)
    nats.set_ylabel("validation loss (nats per byte)")
    nats.yaxis.set_major_formatter("{x:.3g}")
    axes.grid(axis="x", visible=False)
    axes.set_title(_title(points), loc="left")
    figure.legend(loc="outside lower center", ncols=2)
    return plots.png(figure)


@rc_context(plots.STYLE)
def loss_by_kind(points: Sequence[Point]) -> bytes:
    """Draw the validation loss of every kind of linear block, a row each, the best at the top, a mark per share.

    It holds more kinds than `loss_against_ratio` can give lines to. The pure softmax model is a vertical reference.
    """
    mixed = [point for point in points if point.linear is not None]
    best = {kind: min(point.bits_per_byte for point in mixed if point.linear == kind) for kind in kinds(points)}
    rows = sorted(best, key=best.__getitem__, reverse=True)  # from the bottom up
    shares = sorted({point.softmax for point in mixed})
    figure = Figure(figsize=(6.6, 1.6 + 0.27 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for share, look in zip(shares, plots.looks(len(shares)), strict=True):
        marks = [point for point in mixed if point.softmax == share]
        axes.plot(
            [point.bits_per_byte for point in marks],
            [rows.index(point.linear) for point in marks if point.linear is not None],
            color=look.color,
            marker=look.marker,
            linestyle="none",
            label=f"softmax share {share}",
        )
    for point in points:
        if point.linear is None:
            label = f"softmax in every block ({point.bits_per_byte:.3f})"
            axes.axvline(point.bits_per_byte, color=plots.SOFTMAX.color, linestyle=plots.SOFTMAX.line, label=label)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel="validation loss (bits per byte)")
    axes.set_title(_title(points), loc="left", x=-0.2)
    figure.legend(loc="outside lower center", ncols=len(shares) + 1)
    return plots.png(figure)


def _line_with_spread(
    axes: Axes, line: Sequence[Point], shares: Sequence[Fraction], kind: str, look: plots.Look
) -> None:
    places = [shares.index(point.softmax) for point in line]
    axes.plot(
        places,
        [point.bits_per_byte for point in line],
        color=look.color,
        marker=look.marker,
        linestyle=look.line,
        markersize=6,
        label=f"{kind} + softmax",
    )
    for place, point in zip(places, line, strict=True):
        if len(point.runs) > 1:
            axes.errorbar(
                place,
                point.bits_per_byte,
                yerr=[[point.bits_per_byte - point.low], [point.high - point.bits_per_byte]],
                color=look.color,
                capsize=5,
                elinewidth=1.4,
                capthick=1.4,
                linestyle="none",
                label=f"lowest to highest of {len(point.runs)} seeds ({kind} {point.softmax})",
            )


def _title(points: Sequence[Point]) -> str:
    run = points[0].runs[0]
    count = f"{run.tokens / 1e6:.2f} million" if run.tokens >= 1e6 else f"{run.tokens:,}"
    return f"Loss after {count} bytes; unigram entropy {run.unigram_bits_per_byte:.3f} bits per byte (not drawn)"


@rc_context(plots.STYLE)
def loss_curves(runs: Sequence[Run]) -> bytes:
    """Draw training and validation loss of every run against bytes read.

    Each kind of linear block has a column; four columns share a row. Pure softmax runs appear in every column.
    The training loss is the mean over windows of 1/25 of the run.
    """
    columns: list[str | None] = list(dict.fromkeys(run.linear for run in runs if run.linear is not None)) or [None]
    shares = sorted({run.softmax for run in runs if run.linear is not None})
    looks = dict(zip(shares, plots.looks(len(shares)), strict=True))
    unit, scale = ("million bytes", 1e6) if max(run.tokens for run in runs) >= 1e6 else ("thousand bytes", 1e3)
    unigram = runs[0].unigram_bits_per_byte
    abreast, bands = min(len(columns), ABREAST), math.ceil(len(columns) / ABREAST)
    figure = Figure(figsize=(4.3 * abreast + 0.4, 6.4 * bands), layout="constrained")
    cells = figure.subplots(2 * bands, abreast, sharex=True, sharey=True, squeeze=False)
    grid = [[cells[2 * (j // ABREAST) + way][j % ABREAST] for j in range(len(columns))] for way in (0, 1)]
    for empty in cells[-2:, (len(columns) - 1) % ABREAST + 1 :].flat:
        empty.set_visible(False)
    for j, kind in enumerate(columns):
        for run in (run for run in runs if run.linear in (kind, None)):
            look = looks[run.softmax] if run.linear is not None else plots.SOFTMAX
            drawn: Any = {"color": look.color, "linestyle": look.line, "linewidth": 1.2}
            tokens, losses = _windows(run.train)
            grid[0][j].plot([count / scale for count in tokens], losses, **drawn)
            grid[1][j].plot(
                [point.tokens / scale for point in run.validation],
                [point.bits_per_byte for point in run.validation],
                marker=look.marker,
                markersize=4.5,
                label=f"softmax share {run.softmax}",
                **drawn,
            )
        for axes in (grid[0][j], grid[1][j]):
            axes.axhline(unigram, color="0.45", linewidth=1.0, linestyle="-")
        grid[0][j].set_title(f"{kind or 'softmax'}: training", loc="left")
        grid[1][j].set_title(f"{kind or 'softmax'}: validation", loc="left")
        grid[1][j].set_xlabel(f"training text read ({unit})")
    for axes in cells[:, 0]:
        axes.set_ylabel("loss (bits per byte)")
        axes.text(0.0, unigram, " unigram entropy", va="bottom", ha="left", fontsize=8.5, color="0.3")
    lines = {line.get_label(): line for axes in grid[1] for line in axes.get_lines() if line.get_marker() != "None"}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=len(lines))
    grid[0][0].set_ylim(min(point.bits_per_byte for run in runs for point in run.validation) - 0.25, unigram + 0.5)
    return plots.png(figure)


def _windows(train: Sequence[TrainPoint]) -> tuple[list[float], list[float]]:
    """Average the loss, in bits per byte, over windows of steps, at the last step of each."""
    size = max(1, math.ceil(len(train) / BINS))
    groups = [train[i : i + size] for i in range(0, len(train), size)]
    losses = [sum(point.loss for point in group) / len(group) / math.log(2) for group in groups]
    return [float(group[-1].tokens) for group in groups], losses
