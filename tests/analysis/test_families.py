"""The mixers by family: every one of them has one, and what is kept and published is what the code says."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from analysis import families, plots, report
from analysis.points import group_runs, ratio_table
from analysis.runs import read_folder
from layers.registry import MIXERS, BlockContext, mixer_cost, mixer_spec
from tests.analysis.fabricated import write_run

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "analysis/results/mixers"
CONTEXT = BlockContext(dim=32, heads=4, kv_heads=2, layer=1, depth=4, norm_eps=1e-6, rope_base=100.0)
KINDS = {  # family, numbers of a layer's state, tokens of its convolution
    "linear": ("no decay", 4 * 8 * 8, "none"),
    "based": ("polynomial features", 4 * 153 * (8 + 1), "none"),
    "rebased": ("polynomial features", 4 * 136 * (8 + 1), "none"),
    "lightning": ("fixed decay", 4 * 8 * 8, "none"),
    "retention": ("fixed decay", 4 * 8 * 16, "none"),
    "mamba2": ("scalar gate", 4 * 128 * 16, "4"),
    "gla": ("vector gate", 4 * 4 * 8, "none"),
    "hgrn2": ("vector gate", 4 * 8 * 8, "none"),
    "rwkv6": ("vector gate", 4 * 8 * 8, "2"),
    "delta_net": ("delta rule", 4 * 8 * 8, "4"),
    "gated_delta_net": ("delta rule", 4 * 6 * 12, "4"),
    "gated_delta_product": ("delta rule", 4 * 6 * 12, "4"),
    "comba": ("delta rule", 4 * 6 * 12, "4"),
    "short_conv": ("convolution", 0, "3"),
    "kda": ("delta rule", 4 * 8 * 8, "4"),
    "sliding_window": ("softmax", 128 * 2 * 2 * 8, "none"),
}


@pytest.mark.parametrize("name", MIXERS)
def test_what_each_mixer_is_and_keeps(name: str) -> None:
    spec = mixer_spec(name)
    facts = mixer_cost(spec, CONTEXT)
    got = families.family(spec, CONTEXT), families.state(facts), families.convolution(facts)
    if spec.letter == "N":
        assert got == ("softmax", {"softmax": "32 a token", "mla": "36 a token"}[name], "none")
    else:
        kind, numbers, tokens = KINDS[name]
        assert got == (kind, f"{numbers:,}", tokens)


def test_a_report_of_many_kinds_begins_with_their_families(tmp_path: Path) -> None:
    kinds = [name for name, spec in MIXERS.items() if spec.letter == "L"][: len(plots.LOOKS) + 1]
    for number, kind in enumerate(kinds):
        write_run(tmp_path / kind, linear=kind, ratio="0", bits=3 + number / 10, steps=10)
    write_run(tmp_path / "hybrid", linear=kinds[0], ratio="1/4", bits=2.9, steps=10)
    write_run(tmp_path / "softmax", ratio="1", bits=2.75, steps=10)
    found = group_runs(read_folder(tmp_path).runs)
    table = report._main_table(found)
    assert table == families.table(found)
    assert table.header[-3:] == ("share 0", "share 1/4", "share 1")
    places = [families.FAMILIES.index(row[0]) for row in table.rows]
    assert places == sorted(places), "by family"
    rows = {row[1]: row for row in table.rows}
    assert set(rows) == {*kinds, "softmax"}
    assert rows[kinds[0]][-3:] == ("3.000", "2.900", "") and rows["softmax"][-3:] == ("", "", "2.750")
    fewer = [point for point in found if point.linear != kinds[-1]]
    assert report._main_table(fewer) == ratio_table(fewer)


def test_a_pattern_of_several_mixers_is_of_their_families(tmp_path: Path) -> None:
    write_run(tmp_path / "one", changes={"model.pattern": ["retention", "softmax", "gla", "softmax"]})
    (row,) = families.table(group_runs(read_folder(tmp_path).runs)).rows
    assert row[0] == "fixed decay and vector gate" and row[3].count(" and ") == 1 and row[4] == "none"


def test_the_kept_table_is_that_of_the_kept_runs_and_the_readme_has_its_numbers() -> None:
    runs = families.read(KEPT / "runs.json")
    table = families.table(group_runs(runs))
    assert (KEPT / "families.md").read_text() == families.as_text(table)
    parameters = {(run.linear, run.softmax): f"{run.parameters:,}" for run in runs}
    readme = (ROOT / "layers/README.md").read_text()
    for _, mixer, count, state, convolution, pure, hybrid, softmax in table.rows:
        share = Fraction(mixer == "softmax")
        assert count == parameters[None if share else mixer, share], "as the training has counted"
        cells = mixer, count, state, convolution.replace("none", ""), pure or softmax, hybrid
        assert f"| {' | '.join(cells)} |".replace("  ", " ") in readme, mixer
