"""The mixers of a sweep by family: the loss of each, its parameters, the size of its state, and its convolution.

`python -m analysis.families FOLDER` reads `runs.json` from the folder of a report and writes `families.md` next to it.
It needs no other file. The report of a sweep over many mixers begins with the same table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import torch

from analysis import tables, traffic
from analysis.points import Point, group_runs, kinds
from analysis.runs import Run
from analysis.tables import Table
from layers.config import ModelConfig, mixer_specs, model_facts
from layers.cost import Cost
from layers.recurrence import RecurrentMixer
from layers.registry import BlockContext, MixerSpec, mixer_cost

FAMILIES = (
    "convolution", "no decay", "polynomial features", "fixed decay", "scalar gate", "vector gate", "delta rule",
    "softmax",
)  # fmt: skip
DECAYS = {"none": "no decay", "fixed": "fixed decay", "scalar": "scalar gate", "vector": "vector gate"}
LEGEND = (
    "Bits per byte at each share of softmax blocks. Parameters are those of the whole model at the mixer's first "
    "share. State: numbers that one layer keeps of a sequence, over all heads; a window or softmax layer keeps keys "
    "and values. Convolution: tokens that a short convolution (or rwkv6's token shift) reads."
)
Block = tuple[MixerSpec, BlockContext]


def family(spec: MixerSpec, context: BlockContext) -> str:
    """Name the mixer's family: the kind of its decay, or what it is instead."""
    with torch.device("meta"):
        mixer = spec.build(context)
    facts = mixer.cost()
    if facts.attention:
        return "softmax"
    if not facts.summaries:
        return "convolution"
    (summary,) = facts.summaries
    if summary.transition == "matrix":
        return "delta rule"
    if isinstance(mixer, RecurrentMixer) and mixer.shape.features is not None:
        return "polynomial features"
    return DECAYS[summary.transition]


def state(facts: Cost) -> str:
    """Count the numbers that a layer keeps of one sequence, without the inputs of its short convolution."""
    if not facts.attention:
        return f"{facts.state:,}"
    return ", ".join(
        f"{one.row:,} a token" if one.window is None else f"{one.row * one.window:,}" for one in facts.attention
    )


def convolution(facts: Cost) -> str:
    """Count the tokens that a short convolution reads, its own token included."""
    return ", ".join(str(halo.tokens + 1) for halo in facts.halos) or "none"


def table(points: Sequence[Point]) -> Table:
    """Return a row per kind of linear mixer and one for pure softmax, with bits per byte at each share of softmax.

    The columns before the losses follow from the recipe and the cost facts of the mixers.
    """
    shares = sorted({point.softmax for point in points})
    rows = []
    for kind in [*kinds(points), *({None} & {point.linear for point in points})]:
        of_kind = {point.softmax: point for point in points if point.linear == kind}
        model = traffic.model_config(of_kind[min(of_kind)].runs[0])
        blocks = _mixers(model, kind)
        losses = [f"{of_kind[share].bits_per_byte:.3f}" if share in of_kind else "" for share in shares]
        rows.append(
            (
                _each(blocks, family),
                kind or "softmax",
                f"{model_facts(model).parameters:,}",
                _each(blocks, lambda spec, context: state(mixer_cost(spec, context))),
                _each(blocks, lambda spec, context: convolution(mixer_cost(spec, context))),
                *losses,
            )
        )
    rows.sort(key=lambda row: (FAMILIES.index(row[0].split(" and ")[0]), row[1]))
    header = ("family", "mixer", "parameters", "state of a layer", "convolution", *(f"share {one}" for one in shares))
    return Table(header=header, rows=tuple(rows), numbers=frozenset({*header} - {"family", "mixer"}))


def _mixers(model: ModelConfig, kind: str | None) -> list[Block]:
    """Return the last block of each linear mixer; for None, the last softmax block."""
    blocks = ((name, (spec, context)) for name, spec, context in mixer_specs(model))
    last = {name: block for name, block in blocks if (block[0].letter == "N") == (kind is None)}
    return list(last.values())


def _each(blocks: Iterable[Block], fact: Callable[[MixerSpec, BlockContext], str]) -> str:
    return " and ".join(dict.fromkeys(fact(*block) for block in blocks))


def read(file: Path) -> list[Run]:
    """Read the runs of a report from its `runs.json`, without their curves."""
    records = json.loads(file.read_text())
    return [
        Run(**record | {"softmax": Fraction(record["softmax"]), "train": (), "validation": ()}) for record in records
    ]


def as_text(table: Table) -> str:
    """Return the table and the legend of its columns as Markdown."""
    return f"{tables.as_markdown(table)}\n\n{LEGEND}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.families", description="The mixers of a report by family."
    )
    parser.add_argument("folder", type=Path, help="a folder with runs.json, such as analysis/results/mixers")
    folder = parser.parse_args(argv).folder
    text = as_text(table(group_runs(read(folder / "runs.json"))))
    (folder / "families.md").write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
