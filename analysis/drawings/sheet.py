"""The sheet of a drawing: positions in inches from the lower left corner, a few shapes, and PNG bytes at the end."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

DPI = 200  # 8 inches are 1600 pixels, which read well at 800
SHADES = 64  # colours in a file; flat fills and the edges of letters need no more
INK = "#1a1a1a"
TITLE: Any = {"size": 10.5, "weight": "bold"}


class Sheet:
    """The page of a drawing, `width` by `height` inches. Each method draws one kind of shape on it.

    description  what the drawing says, in words; the PNG file carries it
    """

    def __init__(self, width: float, height: float, description: str) -> None:
        self.height, self.description = height, description
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, **options: Any) -> None:
        """Write words with their left end, at half height, at (x, y), unless the options say otherwise."""
        given: Any = {
            "family": "DejaVu Sans",
            "size": 9,
            "color": INK,
            "ha": "left",
            "va": "center",
            "linespacing": 1.35,
            "zorder": 9,
        }
        self.axes.text(x, y, words, **given | options)

    def box(
        self, x: float, y: float, width: float, height: float, words: str = "", *, rounded: float = 0, **options: Any
    ) -> None:
        """Draw a box with its lower left corner at (x, y) and words in its middle."""
        of_text = {key: options.pop(key) for key in ("size", "color", "weight") if key in options}
        if words:
            self.text(x + width / 2, y + height / 2, words, ha="center", **of_text)
        given: Any = {"facecolor": "white", "edgecolor": INK, "linewidth": 1.0, "zorder": 3} | options
        style = f"round,pad=0,rounding_size={rounded}" if rounded else "square,pad=0"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, **given))

    def line(self, points: Sequence[tuple[float, float]], **options: Any) -> None:
        """Draw a line through the points."""
        given: Any = {"color": INK, "linewidth": 1.0, "zorder": 2, "solid_capstyle": "butt"}
        self.axes.plot(*zip(*points, strict=True), **given | options)

    def arrow(self, begin: tuple[float, float], end: tuple[float, float], **options: Any) -> None:
        """Draw an arrow from one point to another."""
        given: Any = {"color": INK, "linewidth": 1.1, "arrowstyle": "-|>", "mutation_scale": 9, "zorder": 5}
        self.axes.add_patch(FancyArrowPatch(begin, end, shrinkA=0, shrinkB=0, **given | options))

    def png(self) -> bytes:
        """Return the sheet as a PNG file with its description inside; equal drawings give equal bytes."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        kept, data = PngInfo(), io.BytesIO()
        kept.add_text("Description", self.description)
        picture.quantize(SHADES, dither=Image.Dither.NONE).save(data, format="png", optimize=True, pnginfo=kept)
        return data.getvalue()
