"""The tables of text, written as Markdown, CSV and HTML. Reports and benchmarks share them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, kw_only=True)
class Table:
    """The header and rows of a table; the columns named in `numbers` are set flush right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str] = frozenset()


def as_markdown(table: Table) -> str:
    """Return the table as GitHub Markdown, padded so that it reads as plain text too."""
    widths = [max(2, *(len(row[i]) for row in (table.header, *table.rows))) for i in range(len(table.header))]  # -:
    right = [name in table.numbers for name in table.header]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(row, widths, right, strict=True)
        ]
        return f"| {' | '.join(cells)} |"

    rule = [("-" * (width - 1) + ":") if r else "-" * width for width, r in zip(widths, right, strict=True)]
    return "\n".join([line(table.header), line(rule), *map(line, table.rows)])


def as_csv(table: Table) -> str:
    """Return the table as CSV with a header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows(table.rows)
    return text.getvalue()


def as_html(table: Table) -> str:
    """Return the table as an HTML element, with every cell escaped."""
    marks = [' class="number"' if name in table.numbers else "" for name in table.header]
    head = "".join(f"<th{mark}>{escape(cell)}</th>" for cell, mark in zip(table.header, marks, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(f"<td{mark}>{escape(cell)}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in table.rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
