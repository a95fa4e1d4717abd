"""The drawing of the engine's imports: a staircase of boxes, with lines that go right and then down."""

from __future__ import annotations

from analysis.drawings.graph import ENGINE, arrows, downward, level, wings
from analysis.drawings.sheet import TITLE, Sheet

WIDTH, ROW, BOX, TALL = 8.0, 0.43, 0.98, 0.29  # inches: the sheet, a row, and a box
MARGIN = 0.12
EXPLANATION = """A box is a folder of hybrid_sp, or a file beside these.
Follow its line to the right: each dot is an import, of
the box at the foot of the dot's column.

All arrows point down. A stripe is a level: a box imports
boxes of its own level or of lower ones."""


def draw() -> Sheet:
    """Draw the imports of the source as it is, every arrow to a later box; raises ValueError if one leads upward.

    Each row and each column holds one box, so that no line can cross another box, however many boxes there are. The
    description lists the arrows, one on a line.
    """
    found = arrows()
    order = downward(wings(), found)
    said = "\n".join(f"{importer} -> {imported}" for importer, imported in sorted(found))
    sheet = Sheet(WIDTH, len(order) * ROW + 2 * MARGIN, said)
    pitch = (WIDTH - BOX - 3 * MARGIN) / (len(order) - 1)
    row = {name: sheet.height - MARGIN - (i + 0.5) * ROW for i, name in enumerate(order)}
    right = {name: MARGIN + BOX + i * pitch for i, name in enumerate(order)}  # edge of the box
    column = {name: right[name] - min(BOX, pitch) / 2 for name in order}
    for name in order:
        if level(name) % 2 == 0:
            sheet.box(0, row[name] - ROW / 2, WIDTH, ROW, facecolor="0.93", linewidth=0, zorder=0)
        dots = [(column[other], row[name]) for other in order if (name, other) in found]
        sheet.line([(right[name], row[name]), *dots], marker="o", markersize=4, markevery=slice(1, None))
        importers = [other for other in order if (other, name) in found]
        if importers:
            sheet.arrow((column[name], row[importers[0]]), (column[name], row[name] + TALL / 2))
        words = f"{name}/" if (ENGINE / name).is_dir() else f"{name}.py"
        sheet.box(right[name] - BOX, row[name] - TALL / 2, BOX, TALL, words, rounded=0.05, weight="bold", size=8.5)
    sheet.text(MARGIN, 1.55, "What imports what in the engine, hybrid_sp", **TITLE)
    sheet.text(MARGIN, 1.35, EXPLANATION, va="top")
    return sheet
