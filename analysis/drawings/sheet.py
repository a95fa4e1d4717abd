"""The sheet of a drawing: positions in inches from the lower left corner, a few shapes, and PNG bytes at the end."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.text import Text
from PIL import Image
from PIL.PngImagePlugin import PngInfo

DPI = 200  # 8 inches are 1600 pixels, which read well at 800
SHADES = 64  # colours in a file; flat fills and the edges of letters need no more
INK = "#1a1a1a"
STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 9, "hatch.linewidth": 0.6, "text.color": INK}


class Sheet:
    """The page of a drawing, `width` by `height` inches. Each method draws one kind of shape on it."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        with rc_context(STYLE):
            self.figure = Figure(figsize=(width, height), facecolor="white")
            self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")
        self._inside: list[tuple[Text, Any]] = []  # words, and the box around them

    def text(self, x: float, y: float, words: str, *, size: float = 9, **options: Any) -> Text:
        """Write words with their left end, at half height, at (x, y), unless the options say otherwise."""
        given: Any = {
            "ha": "left",
            "va": "center",
            "color": INK,
            "fontsize": size,
            "linespacing": 1.35,
            "zorder": 9,
        } | options
        with rc_context(STYLE):
            return self.axes.text(x, y, words, **given)

    def box(self, x: float, y: float, width: float, height: float, words: str = "", **options: Any) -> None:
        """Draw a box with its lower left corner at (x, y) and words in its middle."""
        text = {key: options.pop(key) for key in ("size", "color", "weight") if key in options}
        rounded = options.pop("rounded", 0.0)
        given: Any = {"facecolor": "white", "edgecolor": INK, "linewidth": 1.0, "zorder": 3} | options
        if rounded:
            shape: Any = FancyBboxPatch((x, y), width, height, boxstyle=f"round,pad=0,rounding_size={rounded}", **given)
        else:
            shape = Rectangle((x, y), width, height, **given)
        with rc_context(STYLE):
            self.axes.add_patch(shape)
        if words:
            self._inside.append((self.text(x + width / 2, y + height / 2, words, ha="center", **text), shape))

    def line(self, points: Sequence[tuple[float, float]], **options: Any) -> None:
        """Draw a line through the points."""
        given: Any = {"color": INK, "linewidth": 1.0, "zorder": 2, "solid_capstyle": "butt"} | options
        self.axes.plot([x for x, _ in points], [y for _, y in points], **given)

    def dot(self, x: float, y: float) -> None:
        """Draw a dot that joins lines."""
        self.axes.plot([x], [y], marker="o", color=INK, markersize=4, zorder=4)

    def arrow(self, begin: tuple[float, float], end: tuple[float, float], **options: Any) -> None:
        """Draw an arrow from one point to another."""
        given: Any = {"color": INK, "linewidth": 1.1, "arrowstyle": "-|>", "mutation_scale": 9, "zorder": 5} | options
        self.axes.add_patch(FancyArrowPatch(begin, end, shrinkA=0, shrinkB=0, **given))

    def faults(self) -> list[str]:
        """List the texts that overlap each other, or cross the edge of their box or of the sheet."""
        FigureCanvasAgg(self.figure)
        shown = [(text.get_text(), text.get_window_extent()) for text in self.axes.texts]
        page = self.figure.bbox
        over = [f"{words!r} leaves the sheet" for words, area in shown if not _holds(page, area)]
        over += [
            f"{text.get_text()!r} leaves its box"
            for text, box in self._inside
            if not _holds(box.get_window_extent(), text.get_window_extent())
        ]
        return over + [
            f"{shown[i][0]!r} lies on {shown[j][0]!r}"
            for i in range(len(shown))
            for j in range(i)
            if shown[i][1].overlaps(shown[j][1])
        ]

    def png(self, description: str) -> bytes:
        """Return the sheet as a PNG file with the description inside; equal drawings give equal bytes."""
        with rc_context(STYLE):
            self.figure.set_dpi(DPI)
            canvas = FigureCanvasAgg(self.figure)
            canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        kept, data = PngInfo(), io.BytesIO()
        kept.add_text("Description", description)
        picture.quantize(SHADES, dither=Image.Dither.NONE).save(data, format="png", optimize=True, pnginfo=kept)
        return data.getvalue()


def _holds(page: Any, area: Any) -> bool:
    return bool(page.x0 <= area.x0 and area.x1 <= page.x1 and page.y0 <= area.y0 and area.y1 <= page.y1)
