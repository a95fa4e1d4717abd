"""Tables, figures and the page: that they say what the runs say, stand alone, and name what is missing."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import re
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from analysis import loss_plots, plots, report, tables
from analysis.points import group_runs, ratio_table
from analysis.runs import Folder, read_folder
from tests.analysis.fabricated import BITS, COMMIT, UNIGRAM, write_json, write_run, write_sweep


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("runs") / "trial")


@pytest.fixture(scope="module")
def read(folder: Path) -> Folder:
    return read_folder(folder)


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results") / "trial"
    assert report.main([str(folder), "--out", str(out)]) == 0
    return out


# Tables


def test_points_average_seeds_and_keep_their_extremes(read: Folder) -> None:
    points = {(point.linear, point.softmax): point for point in group_runs(read.runs)}
    assert len(points) == 9
    repeated = points["gla", Fraction(1, 4)]
    assert [run.seed for run in repeated.runs] == [0, 1, 2]
    assert repeated.bits_per_byte == pytest.approx((2.51 + 2.50 + 2.54) / 3)
    assert (repeated.low, repeated.high) == (2.50, 2.54)
    assert points[None, Fraction(1)].bits_per_byte == 2.56
    assert list(points)[-1] == (None, Fraction(1)), "pure softmax comes last"


def test_two_runs_of_one_seed_are_not_averaged(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    with pytest.raises(ValueError, match="runs a, b have the same mixers"):
        group_runs(read_folder(tmp_path).runs)


def test_the_ratio_table_repeats_pure_softmax_and_marks_gaps(read: Folder) -> None:
    table = ratio_table(group_runs(read.runs))
    assert table.header[1:] == ("0", "1/8", "1/4", "1/2", "1")
    assert table.rows[0] == ("gla", "2.600", "2.540", "2.517", "2.520", "2.560")
    fewer = [run for run in read.runs if not (run.linear == "gla" and run.softmax == 0)]
    assert ratio_table(group_runs(fewer)).rows[0][1] == "not run"


def test_the_loss_table_in_three_formats(written: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((written / "loss.csv").read_text())))
    assert len(rows) == 9
    one = next(row for row in rows if row["linear blocks"] == "lightning" and row["softmax share"] == "1/8")
    assert one["loss (bits/byte)"] == f"{BITS['lightning']['1/8']:.4f}"
    assert float(one["loss (nats/byte)"]) == pytest.approx(BITS["lightning"]["1/8"] * 0.693147, abs=1e-4)
    assert one["below unigram"] == f"{100 * (1 - BITS['lightning']['1/8'] / UNIGRAM):.1f} %"
    lines = [line for line in (written / "loss.md").read_text().splitlines() if line.startswith("| ")]
    widths = {line.count("|") for line in lines if "lightning" in line and "LLLLLLLN" in line}
    assert widths == {len(rows[0]) + 1}
    assert " 2.6100 |" in (written / "loss.md").read_text()


def test_cells_are_escaped() -> None:
    table = tables.Table(header=("<b>",), rows=(("a & <i>",),))
    assert tables.as_html(table).count("<") == tables.as_html(table).count(">")
    assert "<td>a &amp; &lt;i&gt;</td>" in tables.as_html(table)
    narrow = tables.Table(header=("H",), rows=(("1",),), numbers=frozenset("H"))
    assert tables.as_markdown(narrow).splitlines()[1] == "| -: |", "GitHub asks for a dash"
    assert tables.as_csv(tables.Table(header=("a",), rows=(('x, "y"',),))) == 'a\n"x, ""y"""\n'


def test_runs_csv_and_json_hold_every_run(written: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((written / "runs.csv").read_text())))
    records = json.loads((written / "runs.json").read_text())
    assert len(rows) == len(records) == 11
    assert {row["commit"] for row in rows} == {COMMIT}
    assert records[0]["recipe"]["model"]["dim"] and records[0]["validation"][-1][2] == records[0]["bits_per_byte"]


# Figures


class Drawn(Exception):
    """Carries a figure out of the function that would turn it into a PNG."""


def figure_of(monkeypatch: pytest.MonkeyPatch, draw: object, *arguments: object) -> Figure:
    def catch(figure: Figure) -> bytes:
        raise Drawn(figure)

    monkeypatch.setattr(plots, "png", catch)
    with pytest.raises(Drawn) as caught:
        draw(*arguments)  # type: ignore[operator]
    figure = caught.value.args[0]
    assert isinstance(figure, Figure)
    return figure


def test_loss_against_ratio_shows_every_point(read: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    points = group_runs(read.runs)
    axes = figure_of(monkeypatch, loss_plots.loss_against_ratio, points).axes[0]
    assert axes.get_xlabel() == "softmax blocks / all blocks"
    assert axes.get_ylabel() == "validation loss (bits per byte)"
    assert [tick.get_text().split("\n")[0] for tick in axes.get_xticklabels()] == ["0", "1/8", "1/4", "1/2"]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["lightning + softmax"].get_ydata()) == list(BITS["lightning"].values())
    assert set(lines["softmax in every block (2.560)"].get_ydata()) == {2.56}
    bars = [segment for collection in axes.collections for segment in collection.get_segments()]  # type: ignore[attr-defined]
    assert [(bar[0][0], bar[0][1], bar[1][1]) for bar in bars] == [(2, pytest.approx(2.50), pytest.approx(2.54))]
    assert f"{UNIGRAM:.3f}" in axes.get_title(loc="left")


def test_lines_can_be_told_apart_without_colour(read: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [(look.marker, str(look.line)) for look in (*plots.LOOKS, plots.SOFTMAX)]
    assert len({marker for marker, _ in looks}) == len({line for _, line in looks}) == len(looks)
    figure = figure_of(monkeypatch, loss_plots.loss_curves, read.runs)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"softmax share {share}" for share in ("0", "1/8", "1/4", "1/2", "1")
    ]
    assert len({line.get_marker() for line in legend.get_lines()}) == 5


def test_loss_curves_hold_every_run(read: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch, loss_plots.loss_curves, read.runs)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["lightning: training", "gla: training", "lightning: validation", "gla: validation"]
    runs_in = [len(axes.get_lines()) - 1 for axes in figure.axes]  # one line is the unigram entropy
    assert runs_in == [5, 7, 5, 7]
    assert figure.axes[2].get_xlabel() == "training text read (thousand bytes)"
    *curves, unigram = figure.axes[2].get_lines()
    assert [line.get_ydata()[-1] for line in curves] == [*BITS["lightning"].values(), 2.56]  # type: ignore[index]
    assert set(unigram.get_ydata()) == {UNIGRAM}


def test_windows_average_the_training_loss(read: Folder) -> None:
    x, y = loss_plots._windows(read.runs[0].train)
    assert len(x) == 20 and x[-1] == read.runs[0].tokens
    first = [point.loss for point in read.runs[0].train[:3]]
    assert y[0] == pytest.approx(sum(first) / 3 / 0.6931471805599453)


def test_too_many_kinds_for_one_figure(read: Folder) -> None:
    with pytest.raises(ValueError, match="looks that read in greyscale"):
        plots.looks(8)


def test_equal_runs_give_equal_pictures(read: Folder, written: Path) -> None:
    again = loss_plots.loss_against_ratio(group_runs(read.runs))
    assert again == (written / "loss_against_ratio.png").read_bytes()


# The page


class Page(HTMLParser):
    """Collects tags, addresses and text, and whether every element that is opened is closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_stands_alone(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Page(text)
    assert len(page.addresses) == 2
    for address, name in zip(page.addresses, ("loss_against_ratio.png", "loss_curves.png"), strict=True):
        kind, _, data = address.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (written / name).read_bytes()
        assert imread(io.BytesIO(base64.b64decode(data)), format="png").shape[0] > 400
    assert not re.search(r"https?:|@import|url\(|<script", text)


def test_the_page_says_how_it_was_made(written: Path, folder: Path) -> None:
    words = "".join(Page((written / "report.html").read_text()).words)
    for expected in (
        "python -m recipes.sweep recipes/ablations/hybrid_ratio.yaml",
        f"python -m analysis.report {folder} --out {written}",
        COMMIT,
        "torch 2.13.0",
        "60 steps of 8 sequences of 512 bytes",
        "2 ranks",
        "Every run read the same 61,440 bytes",
        "at least 43.3 % below it (the least: ratio-0_linear-lightning)",
        "3 seeds of gla with softmax share 1/4 span 0.040 bits per byte (2.500 to 2.540)",
        "a standard deviation of 0.021",
        "a difference is not resolved below about 0.06,",
        "ratio-1-4_linear-gla_seed-2",
    ):
        assert expected in words
    assert "Incomplete" not in words


def test_missing_runs_are_named_in_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "trial")
    (folder / "ratio-0_linear-gla/summary.json").unlink()
    write_json(
        folder / "ratio-1/provenance.json",
        json.loads((folder / "ratio-1/provenance.json").read_text()) | {"commit": "other"},
    )
    assert report.main([str(folder)]) == 1
    words = "".join(Page((folder / "report/report.html").read_text()).words)
    assert "ratio-0_linear-gla: unfinished: there is no summary.json" in words
    assert "Runs were made from different commits" in words
    assert "warning: ratio-0_linear-gla: unfinished" in capsys.readouterr().err
    assert "- ratio-0_linear-gla: unfinished" in (folder / "report/loss.md").read_text()


def test_runs_that_differ_in_more_than_mixers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", ratio="0")
    write_run(tmp_path / "b", changes={"optim.lr": 0.5})
    assert report.main([str(tmp_path)]) == 2
    assert "also differ in optim.lr" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty")]) == 2
    assert "no run folders at all" in capsys.readouterr().err


def write_axes(folder: Path, axes: dict[str, list[object]], **changes: object) -> Path:
    """The runs of a sweep over these axes, the later the better, and its plan."""
    cells = []
    for number, values in enumerate(itertools.product(*axes.values())):
        place = dict(zip(axes, values, strict=True))
        write_run(folder / f"cell-{number}", bits=2.6 - number / 100, steps=10, changes={**changes, **place})
        cells.append({"name": f"cell-{number}", "covers": [place]})
    plan = {"name": "trial", "file": "trial.yaml", "command": "python -m recipes.sweep", "nproc": 2, "cells": cells}
    write_json(folder / "sweep.json", plan)
    return folder


def test_any_axis_of_a_sweep_is_reported(tmp_path: Path) -> None:
    """A learning rate and an option of a mixer, as the plan has them: a row for each cell, the best first."""
    folder = write_axes(tmp_path / "trial", {"optim.lr": [1e-3, 3e-3], "model.mixers.gla.expand_k": [0.5, 1.0]})
    assert report.main([str(folder)]) == 0
    text = (folder / "report/loss.md").read_text()
    rows = list(csv.DictReader(io.StringIO((folder / "report/loss.csv").read_text())))
    assert len(rows) == 4
    cells = {(row["optim.lr"], row["model.mixers.gla.expand_k"]): row["loss (bits/byte)"] for row in rows}
    assert cells == {
        ("0.001", "0.5"): "2.6000",
        ("0.001", "1.0"): "2.5900",
        ("0.003", "0.5"): "2.5800",
        ("0.003", "1.0"): "2.5700",
    }
    assert "of gla with softmax share 1/4, optim.lr=0.003, model.mixers.gla.expand_k=1.0" in text
    first = next(line for line in text.splitlines() if line.startswith("|") and "LLLNLLLN" in line)
    assert "2.5700" in first, "the best at the top"
    words = "".join(Page((folder / "report/report.html").read_text()).words)
    assert "trial: loss by optim.lr, model.mixers.gla.expand_k" in words


def test_what_is_no_axis_of_the_plan_is_still_refused(tmp_path: Path) -> None:
    folder = write_axes(tmp_path / "width", {"model.dim": [64, 96]})
    found = group_runs(read_folder(folder).runs, ["model.dim"])
    assert [dict(point.axes) for point in found] == [{"model.dim": "64"}, {"model.dim": "96"}]
    write_run(folder / "cell-0b", changes={"optim.lr": 0.5, "model.dim": 64}, steps=10)
    plan = json.loads((folder / "sweep.json").read_text())
    plan["cells"].append({"name": "cell-0b", "covers": [{"model.dim": 64}]})
    write_json(folder / "sweep.json", plan)
    with pytest.raises(ValueError, match="also differ in optim.lr;"):
        report.build(read_folder(folder), "")
    both = write_axes(tmp_path / "both", {"model.dim": [64, 96], "parallel.linear": ["all_gather", "ring"]})
    with pytest.raises(ValueError, match=r"differ in strategy \(parallel.linear\) and in model.dim"):
        report.build(read_folder(both), "")


def test_a_single_kind_without_pure_softmax(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ratio="0")
    write_run(tmp_path / "b", ratio="1/2", bits=5.5)
    assert report.main([str(tmp_path)]) == 0
    words = "".join(Page((tmp_path / "report/report.html").read_text()).words)
    assert "Every model was trained with one seed" in words
    assert "Not every run is below it: b is 14.6 % above." in words
    assert "There is no sweep.json" in words


# Strategies


def by_strategy(folder: Path, **metrics: int) -> Path:
    """Two seeds by all-gather and one by ring, which has rounded otherwise; a seed's steps take other times."""
    for seed in (0, 1):
        write_run(folder / f"gather-{seed}", seed=seed, bits=2.5 + seed / 50, metrics=metrics)
    ring = {"tokens_per_second": 7000.0, "comm/exposed_ms": 2.25, "memory_mb": 310.0} | metrics
    changes = {"parallel.linear": "ring", "parallel.overlap": ["softmax"]}
    write_run(folder / "ring", bits=2.5001, changes=changes, metrics=ring)
    return folder


def test_strategies_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_strategy(tmp_path / "trial", **{"comm/bytes_linear": 5000, "comm/bytes_softmax": 1200})
    assert report.main([str(folder)]) == 0
    assert "not recorded" not in capsys.readouterr().out
    ring, gather = sorted(
        csv.DictReader(io.StringIO((folder / "report/strategies.csv").read_text())), key=lambda row: row["tokens/s"]
    )
    assert "parallel.softmax" not in ring and "linear blocks" not in ring, "only what differs"
    assert (ring.pop("parallel.linear"), ring.pop("parallel.overlap")) == ("ring", '["softmax"]')
    assert (gather["parallel.linear"], gather["loss (bits/byte)"]) == ("all_gather", "2.5100")
    model = int(ring.pop("exchanges (model)").replace(",", ""))
    assert 0 < model < int(gather["exchanges (model)"].replace(",", ""))  # a ring sends no decays
    assert list(ring.values()) == ["7,000", "2.25", "40", "5,000", "1,200", "6,200", "310", "2.5001"]
    words = "".join(Page((folder / "report/report.html").read_text()).words)
    assert "trial: one training by several strategies" in words
    assert "same training up to rounding: the first step's losses differ by at most 9.5e-06" in words
    assert "the final ones by 0.0001; which strategy's is lowest is chance" in words
    assert "ring of states, LASP-1 (used here)" in words and "all-gather of states, LASP-2 (used here)" in words
    assert (folder / "report/strategies.png").is_file()


def test_strategies_of_several_models_and_older_runs(tmp_path: Path) -> None:
    folder = by_strategy(tmp_path / "trial")
    write_run(folder / "pure", ratio="1")
    write_run(folder / "off", bits=2.9, changes={"parallel.linear": "ring", "train.recompute": "full"})
    assert report.main([str(folder)]) == 0
    rows = list(csv.DictReader(io.StringIO((folder / "report/strategies.csv").read_text())))
    assert [row["softmax share"] for row in rows] == ["1/4", "1/4", "1/4", "1"]
    assert {row["softmax (bytes)"] for row in rows} == {"not recorded"} and {row["calls"] for row in rows} == {"40"}
    assert [row["train.recompute"] for row in rows].count("full") == 1
    assert "but these did not: the first step's" in (folder / "report/loss.md").read_text()


def test_strategies_without_a_common_seed_or_other_ranks(tmp_path: Path) -> None:
    for seed, linear in enumerate(("auto", "ring")):
        folder = write_run(tmp_path / linear, seed=seed, changes={"parallel.linear": linear})
        provenance = json.loads((folder / "provenance.json").read_text())
        write_json(folder / "provenance.json", provenance | {"sp": 1, "world": 1})
    assert report.main([str(tmp_path)]) == 0
    assert "No model has one seed under two strategies" in (tmp_path / "report/loss.md").read_text()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report/strategies.csv").read_text())))
    assert [(row["parallel.linear"], row["exchanges (model)"]) for row in rows] == [("auto", "0"), ("ring", "0")]


def test_the_figure_of_strategies_has_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = figure_of(monkeypatch, plots.bars, ["a", "b"], {"speed": [3.0, 4.0], "ms": [1.0, 2.0]}).axes
    assert [bar.get_width() for bar in left.patches] == [3.0, 4.0]  # type: ignore[attr-defined]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["a", "b"] and right.get_xlabel() == "ms"


def test_the_charts_of_benchmarks_have_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    (axes,) = figure_of(monkeypatch, plots.ranges, {"linear": {"ring": [1.0, 3.0, 2.0]}}, "ms", "title").axes
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[1.0, 3.0], [2.0]]
    (axes,) = figure_of(monkeypatch, plots.growth, {"linear": {64: 5.0, 128: 6.0}}, "x", "y", "title").axes
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[5.0, 6.0]]
