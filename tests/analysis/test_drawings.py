"""The drawings: no import leads upward, equal sources give equal pictures, no word lies on another."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.drawings.graph import LEVELS, arrows, downward, level, upward, wings
from tests.support.packages import needs
from tests.test_house import LEVELS as HOUSE

ROOT = Path(__file__).parents[2]
PLACES = {"imports": "hybrid_sp/imports.png", "hybrid": "analysis/results/figures/hybrid.png"}
needs_matplotlib = needs("matplotlib", "PIL")


def package(folder: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        file = folder / "engine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return folder / "engine"


def drawing(name: str) -> Any:
    return importlib.import_module(f"analysis.drawings.{name}")


def faults(sheet: Any) -> list[str]:
    """List the texts that overlap each other, or cross the edge of their box or of the sheet."""
    from matplotlib.patches import FancyBboxPatch

    sheet.figure.draw_without_rendering()
    shown = [(text.get_text(), text.get_window_extent()) for text in sheet.axes.texts]
    boxed = [(text.get_text(), text.get_window_extent()) for text in sheet.axes.texts if text.get_ha() == "center"]
    boxes = [patch.get_window_extent() for patch in sheet.axes.patches if isinstance(patch, FancyBboxPatch)]
    return [
        *(f"{words!r} leaves the sheet" for words, area in shown if not holds(sheet.figure.bbox, area)),
        *(
            f"{words!r} leaves its box"
            for words, area in boxed
            for box in boxes
            if box.contains(*center(area)) and not holds(box, area)
        ),
        *(f"{a!r} lies on {b!r}" for (b, under), (a, over) in itertools.combinations(shown, 2) if over.overlaps(under)),
    ]


def center(area: Any) -> tuple[float, float]:
    return (area.x0 + area.x1) / 2, (area.y0 + area.y1) / 2


def holds(page: Any, area: Any) -> bool:
    return bool(page.x0 <= area.x0 and area.x1 <= page.x1 and page.y0 <= area.y0 and area.y1 <= page.y1)


def test_no_import_of_the_engine_leads_upward() -> None:
    found = arrows()
    assert {("ops", "exchange"), ("exchange", "comm"), ("__init__", "ops")} <= found and len(found) > 20
    assert not upward(found)
    order = downward(wings(), found)
    assert set(order) == wings() and order[0] == "__init__"
    assert all(order.index(importer) < order.index(imported) for importer, imported in found)


def test_levels_are_those_of_the_house() -> None:
    assert list(LEVELS) == HOUSE


def test_every_form_of_import_is_an_arrow(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from .ops.one import f",
        "ops/one.py": "from ..shard import Shard\ndef f():\n    from .. import checks\n    import engine.comm.link",
        "ops/two.py": "from . import one\nfrom .one import f\nimport torch.comm\nfrom engine import overlap, VERSION",
        "exchange/__init__.py": "from ..comm import link",
        "shard.py": "import os\nfrom .comm.link import open",
        "comm/link.py": "",
        "checks.py": "",
        "overlap.py": "",
    }
    found = arrows(package(tmp_path, files))
    of_ops = {("ops", name) for name in ("shard", "checks", "comm", "overlap", "__init__")}
    assert found == of_ops | {("__init__", "ops"), ("exchange", "comm"), ("shard", "comm")}
    assert upward(found) == [("ops", "__init__")]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no level has 'novel': put it into LEVELS of analysis/drawings/graph\.py"):
        level("novel")
    with pytest.raises(ValueError, match="imports lead upward: comm -> ops"):
        downward(["ops", "comm"], {("comm", "ops")})
    with pytest.raises(ValueError, match="wings of one level import each other: checks, overlap"):
        downward(["checks", "overlap"], {("checks", "overlap"), ("overlap", "checks")})
    assert downward(["overlap", "checks", "ops"], {("overlap", "checks")}) == ["ops", "overlap", "checks"]


@needs_matplotlib
@pytest.mark.parametrize("name", PLACES)
def test_no_word_lies_on_another_or_leaves_its_box(name: str) -> None:
    assert faults(drawing(name).draw()) == []


@needs_matplotlib
def test_faults_are_seen() -> None:
    sheet = drawing("sheet").Sheet(2, 1, "")
    sheet.box(0.5, 0.5, 0.2, 0.2, "wide words")
    sheet.text(0.5, 0.6, "words")
    sheet.text(1.9, 0.2, "words over the edge")
    assert faults(sheet) == [
        "'words over the edge' leaves the sheet",
        "'wide words' leaves its box",
        "'words' lies on 'wide words'",
    ]


@needs_matplotlib
def test_the_command_draws_both_and_another_process_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "analysis.drawings", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, place in PLACES.items():
        drawn = (tmp_path / place).read_bytes()
        assert drawn == drawing(name).draw().png()
        assert len(drawn) < 200_000


@needs_matplotlib
@pytest.mark.parametrize("name", PLACES)
def test_what_is_kept_is_what_the_source_says(name: str) -> None:
    """Another version of matplotlib may draw letters otherwise, so that pictures are compared by what they say."""
    from PIL import Image

    with Image.open(ROOT / PLACES[name]) as kept:
        said = kept.text["Description"]
    assert said == drawing(name).draw().description, f"draw it again: python -m analysis.drawings {name}"
