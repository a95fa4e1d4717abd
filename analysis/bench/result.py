"""The outcome of a benchmark: rows, claims, tables and figures, written as report.md and results.json."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from analysis.tables import Table, as_markdown


@dataclass(frozen=True, kw_only=True)
class Row:
    """The repeated measurements of one contender at one length."""

    contender: str
    length: int
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The measured value of a ratio, and its bound."""

    what: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None

    def cells(self) -> tuple[str, ...]:
        """Return the claim's line of the table: ratio, value, bound, and yes or NO."""
        holds = (self.at_least is None or self.measured >= self.at_least) and (
            self.at_most is None or self.measured <= self.at_most
        )
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        return self.what, f"{self.measured:.2f}", bound, "yes" if holds else "NO"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of one benchmark.

    unit     the unit of the values in `rows`
    body     the report's tables and paragraphs, in order
    facts    further entries of results.json
    figures  a function that draws the PNG, for each file name; it may import matplotlib
    cut      whether a signal ended the measurements
    """

    title: str
    unit: str
    body: Sequence[str | Table]
    rows: list[Row]
    claims: list[Claim]
    facts: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    cut: bool = False


def growth(rows: Mapping[tuple[str, int], Row], name: str, lengths: Sequence[int]) -> Claim:
    """Claim that a token of the longest sequence takes at most 1.2 times a token of the shortest."""
    first, last = (rows[name, length].median / length for length in (lengths[0], lengths[-1]))
    what = f"{name}, time per token at T={lengths[-1]} over T={lengths[0]}"
    return Claim(what=what, measured=last / first, at_most=1.2)


def write(result: Result, facts: Mapping[str, Any], folder: Path) -> str:
    """Write report.md, results.json and the figures into the folder, and return the report.

    Without matplotlib a note on stderr takes the place of the figures.
    """
    device = f", {facts['device']['name']}" if facts["device"] else ""
    claims = Table(
        header=("ratio of medians", "measured", "bound", "holds"),
        rows=tuple(claim.cells() for claim in result.claims),
        numbers=frozenset({"measured"}),
    )
    closing = f"`{facts['command']}` at commit {facts['commit']}, torch {torch.__version__}{device}."
    notes = [facts["note"]] if facts.get("note") else []
    sections = [f"## {result.title}", *notes, *result.body, *([claims] if result.claims else []), closing]
    report = "\n\n".join(as_markdown(one) if isinstance(one, Table) else one for one in sections)
    values = {**facts, **result.facts, "unit": result.unit, "rows": result.rows, "claims": result.claims}
    (folder / "report.md").write_text(report + "\n")
    (folder / "results.json").write_text(json.dumps(values, default=asdict, indent=1) + "\n")
    for name, draw in result.figures.items():
        try:
            (folder / name).write_bytes(draw())
        except ImportError as error:
            print(f"skipped: {name} ({error})", file=sys.stderr)
    return report
