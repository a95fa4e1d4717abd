"""The report of a sweep over mixers, ratios, strategies or others: `python -m analysis.report FOLDER [--out DIR]`.

It writes these files:

    loss.md, loss.csv  the facts, and a row for each model
    runs.csv           a row for each run
    runs.json          the recipe, provenance and curves of each run
    loss_curves.png    the loss during training
    report.html        all of the above as one page that loads no other file

A second figure is named after the comparison: loss_against_ratio.png, loss_by_kind.png, loss_by_axes.png or
strategies.png. If the runs differ in strategy, `strategies.csv` gives the cost of each strategy.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import stdev
from typing import Any

from omegaconf import OmegaConf

from analysis import families, loss_plots, plots, points, strategies, tables, traffic
from analysis.points import Point
from analysis.runs import STRATEGY_KEYS, Folder, Run, axes, differing_keys, is_under, read_folder
from analysis.tables import Table

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ddd }
.sub { color: #555; margin-top: 0 } figure { margin: 1rem 0 } img { max-width: 100%; height: auto }
figcaption { color: #444; font-size: .9rem; max-width: 48rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .65rem; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: bottom }
th { border-bottom: 1.5px solid #555 } .number { text-align: right } td { white-space: nowrap }
pre { background: #f5f5f3; padding: .7rem .9rem; white-space: pre-wrap; font-size: .85rem } code { font-size: .9em }
.warning { background: #fff3e2; border-left: 4px solid #c26a00; padding: .5rem .9rem }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1.2rem; font-size: .92rem }
dt { color: #555 } dd { margin: 0 }
"""


CURVES = "loss_curves.png"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of a report before it is written: sentences, tables, and figures (PNG bytes by file name)."""

    name: str
    facts: tuple[str, ...]
    warnings: tuple[str, ...]
    commands: tuple[str, ...]
    settings: dict[str, str]
    question: str  # for the title: the comparison that this report makes
    strategic: bool  # True if the runs differ in strategy; `main` then compares strategies
    main: Table
    losses: Table
    runs: Table
    costs: tuple[tuple[str, Table], ...]
    figures: dict[str, tuple[bytes, str]]
    recipe: str


def build(folder: Folder, command: str) -> Report:
    """Turn a sweep's folder into a report, which prints `command`, the line that made it.

    Raises ValueError if the runs differ in more than mixers, seed, strategy and the axes of the sweep's plan. No
    single cause would then explain a difference.
    """
    varied = axes(folder)
    known = (*STRATEGY_KEYS, *varied)
    if differing := [key for key in differing_keys(folder.runs) if not is_under(key, known)]:
        raise ValueError(
            f"the runs in {folder.path} also differ in {', '.join(differing)}; this report compares kinds and shares "
            "of mixers, strategies, and the axes of a sweep, so put runs that are equal in all else into one folder"
        )
    runs = sorted(folder.runs, key=lambda run: (run.linear is None, run.linear or "", run.softmax, run.seed))
    found = points.group_runs(runs, varied)
    if varied and found[0].strategy:
        raise ValueError(
            f"the runs in {folder.path} differ in strategy ({', '.join(found[0].strategy)}) and in "
            f"{', '.join(varied)}, of which this report compares one; give each strategy a folder of its own"
        )
    return Report(
        name=str(folder.plan["name"]) if folder.plan else folder.path.name,
        facts=tuple(_facts(runs, found)),
        warnings=tuple(_warnings(folder)),
        commands=tuple([str(folder.plan["command"])] if folder.plan else []) + (command,),
        settings=_settings(runs),
        question=_question(found),
        strategic=bool(found[0].strategy),
        main=_main_table(found),
        losses=points.loss_table(found),
        runs=points.run_table(runs),
        costs=() if varied else traffic.cost_tables(found),  # these need layers of one size
        figures={
            **_main_figure(found),
            CURVES: (
                loss_plots.loss_curves(runs),
                f"All {len(runs)} runs. Training loss: means over windows of 1/{loss_plots.BINS} of a run. Validation: "
                "text that is not trained on. The grey line is the unigram entropy of that text.",
            ),
        },
        recipe=OmegaConf.to_yaml(OmegaConf.create(dict(runs[0].recipe))),
    )


def _facts(runs: Sequence[Run], found: Sequence[Point]) -> list[str]:
    best = min(found, key=lambda point: point.bits_per_byte)
    worst = min(runs, key=lambda run: run.below_unigram)
    facts = [
        f"Lowest validation loss: {best.bits_per_byte:.3f} bits per byte ({best.loss:.3f} nats), of {_title(best)}.",
        f"The unigram entropy of the text is {runs[0].unigram_bits_per_byte:.3f} bits per byte. "
        + (
            f"Every run is at least {100 * worst.below_unigram:.1f} % below it (the least: {worst.name})."
            if worst.below_unigram > 0
            else f"Not every run is below it: {worst.name} is {-100 * worst.below_unigram:.1f} % above."
        ),
    ]
    tokens = sorted({run.tokens for run in runs})
    if len(tokens) == 1:
        facts.append(f"Every run read the same {tokens[0]:,} bytes of training text in {runs[0].steps} steps.")
    if found[0].strategy:
        facts += [strategies.sameness(runs), strategies.LEGEND]
    elif _many(found) and not found[0].axes:
        facts.append(families.LEGEND)
    for point in found:
        if len(point.runs) > 1:
            deviation = stdev(run.bits_per_byte for run in point.runs)
            facts.append(
                f"{len(point.runs)} seeds of {_title(point)} span {point.high - point.low:.3f} bits per byte "
                f"({point.low:.3f} to {point.high:.3f}), a standard deviation of {deviation:.3f}: between two runs, a "
                f"difference is not resolved below about {2 * math.sqrt(2) * deviation:.2f}, twice its own deviation."
            )
    if all(len(point.runs) == 1 for point in found):
        facts.append("Every model was trained with one seed, so nothing here says how much of a difference is chance.")
    return facts


def _question(found: Sequence[Point]) -> str:
    if found[0].strategy:
        return "one training by several strategies"
    if found[0].axes:
        return f"loss by {', '.join(found[0].axes)}"
    return "loss against the ratio of linear to softmax blocks"


def _title(point: Point) -> str:
    mixers = "softmax in every block" if point.linear is None else f"{point.linear} with softmax share {point.softmax}"
    return ", ".join([mixers, *(f"{key}={value}" for key, value in {**point.strategy, **point.axes}.items())])


def _many(found: Sequence[Point]) -> bool:
    """Return True if there are more kinds of mixers than lines that a reader can tell apart."""
    return len(points.kinds(found)) > len(plots.LOOKS)


def _main_table(found: Sequence[Point]) -> Table:
    """Choose the first table of the report: strategies, a sweep's axes, many kinds by family, or shares."""
    if found[0].strategy:
        return strategies.table(found)
    if found[0].axes:
        return points.loss_table(sorted(found, key=lambda point: point.bits_per_byte))
    return families.table(found) if _many(found) else points.ratio_table(found)


def _main_figure(found: Sequence[Point]) -> dict[str, tuple[bytes, str]]:
    """Draw the first figure of the report: lines over shares, or a row for each strategy, axis value or kind."""
    if found[0].strategy:
        rows = [" ".join(row[: -len(strategies.NUMBERS)]) for row in strategies.table(found).rows]
        columns = {"tokens a second": [*map(strategies.speed, found)], "ms exposed": [*map(strategies.exposed, found)]}
        caption = "The median step of every strategy; exposed is the time in which rank 0 stood still for others."
        return {"strategies.png": (plots.bars(rows, columns), caption)}
    if found[0].axes:
        best = sorted(found, key=lambda point: point.bits_per_byte)
        losses = {"validation loss (bits per byte)": [point.bits_per_byte for point in best]}
        return {"loss_by_axes.png": (plots.bars([_title(point) for point in best], losses), "The best at the top.")}
    if _many(found):
        return {
            "loss_by_kind.png": (loss_plots.loss_by_kind(found), "Every kind of linear block, the best at the top.")
        }
    return {"loss_against_ratio.png": (loss_plots.loss_against_ratio(found), _ratio_caption(found))}


def _ratio_caption(found: Sequence[Point]) -> str:
    repeated = [point for point in found if len(point.runs) > 1]
    bars = "; ".join(f"{_title(point)}, {len(point.runs)} seeds" for point in repeated)
    spread = f"A point with a bar is a mean, its bar spans lowest and highest seed ({bars})." if repeated else ""
    return (
        "Final validation loss against the share of softmax blocks. The horizontal line has softmax in every block. "
        f"Other points are one seed each. {spread}"
    )


def _warnings(folder: Folder) -> list[str]:
    warnings = [f"{fault.name}: {fault.reason}." for fault in folder.faults]
    if folder.plan is None:
        warnings.append("There is no sweep.json, so runs that were never started cannot be named.")
    for what, values in (
        ("read different amounts of text", {run.name: run.tokens for run in folder.runs}),
        ("were made from different commits", {run.name: run.provenance.get("commit") for run in folder.runs}),
        ("were cut over different numbers of ranks", {run.name: run.provenance.get("sp") for run in folder.runs}),
        ("read different text (SHA-256)", {run.name: _text_hash(run) for run in folder.runs}),
        ("have different unigram entropies", {run.name: run.unigram_bits_per_byte for run in folder.runs}),
    ):
        if len(set(values.values())) > 1:
            warnings.append(f"Runs {what}: {', '.join(f'{name} {value}' for name, value in values.items())}.")
    return warnings


def _text_hash(run: Run) -> str:
    return str(run.provenance["corpus"]["fingerprint"])[:12]


def _settings(runs: Sequence[Run]) -> dict[str, str]:
    recipe, provenance = runs[0].recipe, runs[0].provenance
    model, data, train, parallel = (recipe[key] for key in ("model", "data", "train", "parallel"))
    layout = "zigzag if any block is softmax" if parallel["layout"] == "auto" else parallel["layout"]
    minutes = sum(run.seconds for run in runs) / 60
    of = " of the first run" if differing_keys(runs) else ""
    return {
        "model": f"{len(runs[0].pattern)} blocks, width {model['dim']}, {model['heads']} heads",
        "training": f"{runs[0].steps} steps of {train['batch']} sequences of {data['length']} bytes, {train['dtype']}",
        "sequence cut over": f"{provenance['sp']} ranks, layout {layout}; data parallel {provenance['dp']}",
        f"exchanges{of}": f"linear blocks: {parallel['linear']}, softmax blocks: {parallel['softmax']}",
        "text": f"{provenance['corpus']['bytes']:,} bytes in {provenance['corpus']['files']} files, "
        f"SHA-256 {_text_hash(runs[0])}...",
        "time": f"{len(runs)} runs, {minutes:.1f} minutes in sum, {provenance['machine']['cpus']} CPU cores",
        "commit": f"{provenance['commit']}{', with changes that were not committed' if runs[0].modified else ''}",
        "versions": ", ".join(f"{key} {value}" for key, value in provenance["versions"].items() if value),
    }


def as_page(report: Report) -> str:
    """Return the report as one HTML page with style and images inside; it loads nothing from elsewhere."""

    def figure(name: str) -> str:
        data, caption = report.figures[name]
        image = base64.b64encode(data).decode()
        return (
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{image}">\n'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def wide(table: Table) -> str:
        return f'<div class="wide">{tables.as_html(table)}</div>'

    warnings = "".join(f"<p>{escape(line)}</p>" for line in report.warnings)
    settings = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in report.settings.items())
    sections = [
        f"<h1>{escape(report.name)}: {escape(report.question)}</h1>",
        f'<p class="sub">{escape(report.settings["training"])}; {escape(report.settings["sequence cut over"])}</p>',
        f'<div class="warning"><strong>Incomplete or uneven</strong>{warnings}</div>' if warnings else "",
        "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in report.facts) + "</ul>",
        *[figure(name) for name in report.figures if name != CURVES],
        wide(report.main),
        "<h2>Every model</h2>",
        wide(report.losses),
        "<h2>Loss curves</h2>",
        figure(CURVES),
        "<h2>Communication</h2>" if report.costs else "",
        *[f"<p>{escape(text)}</p>{wide(table)}" for text, table in report.costs],
        "<h2>How it was made</h2>",
        f"<pre>{escape(chr(10).join(report.commands))}</pre>",
        f"<dl>{settings}</dl>",
        f"<details><summary>Every run</summary>{wide(report.runs)}</details>",
        f"<details><summary>Resolved recipe of the first run</summary><pre>{escape(report.recipe)}</pre></details>",
    ]
    head = [
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">',
        f'<meta name="viewport" content="width=device-width"><title>{escape(report.name)}</title>',
        f"<style>{CSS}</style></head>\n<body>",
    ]
    return "\n".join([*head, *filter(None, sections), "</body>\n</html>\n"])


def as_text(report: Report) -> str:
    """Return the report's sentences and tables as Markdown."""
    sections = [f"# {report.name}"]
    if report.warnings:
        sections.append("Incomplete or uneven:\n\n" + "\n".join(f"- {line}" for line in report.warnings))
    sections += [
        "\n".join(f"- {fact}" for fact in report.facts),
        tables.as_markdown(report.main),
        tables.as_markdown(report.losses),
        *[f"{text}\n\n{tables.as_markdown(table)}" for text, table in report.costs],
        "\n".join(f"- {key}: {value}" for key, value in report.settings.items()),
        "```\n" + "\n".join(report.commands) + "\n```",
    ]
    return "\n\n".join(sections) + "\n"


def write(report: Report, runs: Sequence[Run], out: Path) -> list[Path]:
    """Write every file of the report into `out` and return their paths."""
    records = [_record(run) for run in runs]
    files: dict[str, bytes] = {
        "loss.md": as_text(report).encode(),
        "loss.csv": tables.as_csv(report.losses).encode(),
        **({"strategies.csv": tables.as_csv(report.main).encode()} if report.strategic else {}),
        "runs.csv": tables.as_csv(report.runs).encode(),
        "runs.json": (json.dumps(records, separators=(",", ":")).replace('},{"name"', '},\n{"name"') + "\n").encode(),
        **{name: data for name, (data, _) in report.figures.items()},
        "report.html": as_page(report).encode(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    return [out / name for name in files]


def _record(run: Run) -> dict[str, Any]:
    kept = ("commit", "versions", "dp", "sp", "world", "started", "earlier_starts", "corpus")
    provenance = {key: run.provenance[key] for key in kept if key in run.provenance}
    record = asdict(run) | {"softmax": str(run.softmax), "provenance": provenance}
    record["train"] = [[point.step, point.tokens, round(point.loss, 5)] for point in run.train]
    record["validation"] = [[point.step, point.tokens, point.bits_per_byte] for point in run.validation]
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 complete, 1 written but runs are missing, 2 not written."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description="Report the runs of a sweep.")
    parser.add_argument("folder", help="the folder of a sweep, such as runs/hybrid_ratio")
    parser.add_argument("--out", help="where to write; by default FOLDER/report")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    try:
        folder = read_folder(arguments.folder)
        report = build(folder, " ".join(["python -m analysis.report", *words]))
        written = write(report, folder.runs, Path(arguments.out or folder.path / "report"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(tables.as_markdown(report.main if report.strategic else report.losses), end="\n\n")
    print(*report.facts, sep="\n")
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print("written:", *written, sep="\n  ")
    return 1 if folder.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
