"""The benchmark program on tiny sizes: what it measures, writes and claims."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from layers.registry import MIXERS
from recipes.bench import network
from recipes.bench.__main__ import BENCHES, main
from recipes.bench.measure import Claim
from recipes.bench.strategies import LINEAR, SOFTMAX

ROOT = Path(__file__).parents[2]


def test_linear_runs_without_the_packages_of_recipes(tmp_path: Path) -> None:
    """In a process of its own: it needs omegaconf and wandb as little as the engine does."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["omegaconf", "wandb", "matplotlib", "rich"]))
from recipes.bench import network
from recipes.bench.__main__ import BENCHES, main
main(["linear", "--quick", "--out", {str(tmp_path)!r}])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = (tmp_path / "linear" / "report.md").read_text()
    assert report in run.stdout
    results = json.loads((tmp_path / "linear" / "results.json").read_text())
    assert {"command", "commit", "versions", "machine", "unit", "rows", "claims"} <= results.keys()
    measured = {(row["contender"], row["length"]) for row in results["rows"]}
    assert {("torch causal SDPA", 128), ("fla-core naive_chunk_simple_gla", 128)} <= measured
    assert {length for _, length in measured} == {128, 256} and len(measured) == 10
    assert all(len(row["values"]) == 2 and min(row["values"]) > 0 for row in results["rows"])
    assert len(results["claims"]) == 4 and report.count("| at ") == 4


def test_delta_and_mixers_measure_every_contender(tmp_path: Path) -> None:
    main(["delta", "mixers", "--quick", "--out", str(tmp_path)])
    delta, mixers = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("delta", "mixers"))
    contenders = {row["contender"] for row in delta["rows"]}
    assert {"delta_rule [B,T,H]", "transformers torch_chunk_gated_delta_rule"} <= contenders
    linear = {name for name, spec in MIXERS.items() if spec.letter == "L"}
    assert {row["contender"] for row in mixers["rows"]} == linear
    assert len(mixers["claims"]) == len(linear)


def test_model_compares_two_ranks_with_one_process(tmp_path: Path) -> None:
    main(["model", "--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    sp, one = (row["values"] for row in results["rows"])
    assert len(sp) == len(one) == 1
    assert results["claims"][0]["measured"] == pytest.approx(sp[0] / one[0])
    for folder in ("sp2-one-thread-each-0", "one-process-two-threads-0"):
        provenance = json.loads((tmp_path / "model" / folder / "provenance.json").read_text())
        assert provenance["sp"] == (2 if folder.startswith("sp2") else 1)


def test_every_strategy_is_measured_on_every_kind_of_layer(tmp_path: Path) -> None:
    """Four hosts where namespaces can be made, a pretended link elsewhere."""
    main(["strategies", "--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "strategies" / "results.json").read_text())
    measured = {row["contender"] for row in results["rows"]}
    assert len(measured) == len(LINEAR) * 3 - 1 + len(SOFTMAX) and all(row["values"] for row in results["rows"])
    shares = [claim for claim in results["claims"] if "bytes received" in claim["what"]]
    assert len(shares) == 3 and all(claim["measured"] <= claim["at_most"] for claim in shares)
    with Image.open(tmp_path / "strategies" / "strategies.png") as picture:
        assert min(picture.size) > 300


def test_schedules_are_measured_on_a_pretended_link_where_none_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "impossible", lambda: "no root here")
    main(["overlap", "flat", "balance", "--quick", "--out", str(tmp_path)])
    for name, rows in (("overlap", 4), ("flat", 4), ("balance", 2)):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert len(results["rows"]) == rows and all(claim["measured"] > 0 for claim in results["claims"])
    for name in ("overlap", "flat"):
        report = (tmp_path / name / "report.md").read_text()
        assert "a pretended link of 200 Mbit/s and 0.1 ms (no root here)" in report
    with Image.open(tmp_path / "flat" / "flat.png") as picture:
        assert min(picture.size) > 300


def test_a_claim_says_whether_it_holds() -> None:
    assert Claim(what="faster", measured=3.6, at_least=3.5).line() == "| faster | 3.60 | at least 3.5 | yes |"
    assert Claim(what="faster", measured=3.4, at_least=3.5).line().endswith("NO |")
    assert Claim(what="growth", measured=1.3, at_most=1.2).line().endswith("NO |")


def test_unknown_benchmarks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["linaer"])
    assert f"unknown benchmark linaer; known: {', '.join(BENCHES)}" in capsys.readouterr().err
