"""The charts of plain numbers, drawn as PNG bytes, and the style of every figure.

They need matplotlib and import no other file of this project. Every line has its own marker and line style, so that
a print in greyscale shows which is which.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

DPI = 150
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """The colour, marker and line style of one line; colours also differ in lightness."""

    color: str
    marker: str
    line: Any  # a name or a dash pattern of matplotlib


LOOKS = (
    Look(color="#14406f", marker="o", line="-"),
    Look(color="#d9822b", marker="s", line="--"),
    Look(color="#3f9e77", marker="^", line="-."),
    Look(color="#8d3f73", marker="D", line=":"),
    Look(color="#9a9a2e", marker="v", line=(0, (6, 1, 1, 1, 1, 1))),
    Look(color="#57a8d6", marker="P", line=(0, (1, 2))),
    Look(color="#b04a3a", marker="X", line=(0, (8, 3))),
)
SOFTMAX = Look(color="black", marker="*", line=(0, (4, 2)))


@rc_context(STYLE)
def bars(rows: Sequence[str], columns: Mapping[str, Sequence[float]]) -> bytes:
    """Draw a panel of horizontal bars for each column of numbers, the first row at the top."""
    figure = Figure(figsize=(8.6, 1.0 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (name, numbers) in zip(panels, columns.items(), strict=True):
        drawn = axes.barh(range(len(rows)), numbers, color=LOOKS[0].color, height=0.6)
        axes.bar_label(drawn, fmt="{:,.4g}", padding=3, fontsize=8.5)
        axes.set_yticks(range(len(rows)), rows)
        axes.margins(x=0.18)
        axes.set_xlabel(name)
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    return png(figure)


@rc_context(STYLE)
def ranges(panels: Mapping[str, Mapping[str, Sequence[float]]], label: str, title: str) -> bytes:
    """Draw a panel for each kind; each of its rows marks a median and spans the least and the greatest value."""
    figure = Figure(figsize=(8, 1.0 + 0.3 * sum(2 + len(rows) for rows in panels.values())), layout="constrained")
    heights = [1 + len(rows) for rows in panels.values()]
    stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kind, rows) in zip(stack, panels.items(), strict=True):
        for place, values in enumerate(rows.values()):
            middle = median(values)
            axes.plot([min(values), max(values)], [place, place], color="0.6", linewidth=3)
            axes.plot(middle, place, "o", color=LOOKS[0].color)
            axes.annotate(f"{middle:,.0f}", (middle, place), (7, -3), textcoords="offset points")
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xscale="log", ylim=(len(rows) - 0.5, -0.5))
        axes.set_title(kind, loc="left")
        axes.grid(axis="y", visible=False)
    stack[-1].set_xlabel(label)
    stack[-1].margins(x=0.1)
    figure.suptitle(title)
    return png(figure)


@rc_context(STYLE)
def growth(series: Mapping[str, Mapping[int, float]], xlabel: str, ylabel: str, title: str) -> bytes:
    """Draw a line for each series of numbers by size, on logarithmic axes."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, numbers), look in zip(series.items(), looks(len(series)), strict=True):
        axes.plot(*zip(*numbers.items(), strict=True), label=name, color=look.color, marker=look.marker, ls=look.line)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log", title=title)
    axes.set_xscale("log", base=2)
    axes.legend()
    return png(figure)


def looks(count: int) -> list[Look]:
    """Return a look for each of `count` lines; raises ValueError if there are more lines than looks."""
    if count > len(LOOKS):
        raise ValueError(
            f"{count} lines in one figure, but {len(LOOKS)} looks that read in greyscale; report fewer kinds"
        )
    return list(LOOKS[:count])


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file; equal figures give equal bytes."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    return data.getvalue()
