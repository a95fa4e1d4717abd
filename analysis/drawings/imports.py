"""The drawing of the engine's imports: a staircase of boxes, with lines that go right and then down."""

from __future__ import annotations

from analysis.drawings.graph import ENGINE, Arrow, arrows, downward, level, wings
from analysis.drawings.sheet import Sheet

WIDTH, ROW, BOX, TALL = 8.0, 0.43, 0.98, 0.29  # inches: the sheet, a row, and a box
TITLE = "What imports what in the engine, hybrid_sp"
EXPLANATION = """A box is a folder of hybrid_sp, or a file beside these.
Follow its line to the right: each dot is an import, of
the box at the foot of the dot's column.

All arrows point down. A stripe is a level: a box imports
boxes of its own level or of lower ones."""


def draw() -> Sheet:
    """Draw the imports of the source as it is; raises ValueError if one leads upward."""
    return staircase(downward(wings(), arrows()), arrows())


def staircase(order: list[str], found: set[Arrow]) -> Sheet:
    """Draw the boxes in this order, in which every arrow leads to a later box.

    Each row and each column holds one box, so that no line can cross another box, however many boxes there are.
    """
    margin = 0.12
    sheet = Sheet(WIDTH, len(order) * ROW + 2 * margin)
    first, pitch = margin + BOX, (WIDTH - BOX - 3 * margin) / max(len(order) - 1, 1)
    row = {name: sheet.height - margin - (i + 0.5) * ROW for i, name in enumerate(order)}
    right = {name: first + i * pitch for i, name in enumerate(order)}  # edge of the box
    column = {name: right[name] - min(BOX, pitch) / 2 for name in order}
    for name in order:
        if level(name) % 2 == 0:
            sheet.box(0, row[name] - ROW / 2, WIDTH, ROW, facecolor="0.93", edgecolor="none", linewidth=0, zorder=0)
    for name in order:
        imported = [other for other in order if (name, other) in found]
        importers = [other for other in order if (other, name) in found]
        if imported:
            sheet.line([(right[name], row[name]), (column[imported[-1]], row[name])])
        for other in imported:
            sheet.dot(column[other], row[name])
        if importers:
            sheet.arrow((column[name], row[importers[0]]), (column[name], row[name] + TALL / 2))
        words = f"{name}/" if (ENGINE / name).is_dir() else f"{name}.py"
        sheet.box(right[name] - BOX, row[name] - TALL / 2, BOX, TALL, words, rounded=0.05, weight="bold", size=8.5)
    sheet.text(margin, 1.55, TITLE, size=10.5, weight="bold")
    sheet.text(margin, 1.35, EXPLANATION, va="top")
    return sheet


def description() -> str:
    """List the arrows of the drawing, one on a line."""
    return "\n".join(f"{importer} -> {imported}" for importer, imported in sorted(arrows()))
