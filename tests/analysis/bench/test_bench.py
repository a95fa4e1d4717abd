"""The benchmark program on tiny sizes: what it measures, writes and claims."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from analysis.bench.__main__ import BENCHES, main
from analysis.bench.device import Budget, Ceilings, Stopwatch
from analysis.bench.gpu import operators as kernels
from analysis.bench.gpu import overlap_model as hiding
from analysis.bench.gpu.contenders import DECAYS, Contender, found
from analysis.bench.measure import QUICK, Claim
from analysis.bench.ranks import network
from analysis.bench.ranks.strategies import LINEAR, SOFTMAX
from layers.cost import Summary
from layers.registry import MIXERS
from tests.support.packages import needs

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "peers",
    [["fla", "triton"], pytest.param([], marks=[pytest.mark.slow, needs("fla", "triton")])],
    ids=["without fla-core", "with fla-core"],
)
def test_linear_runs_without_the_packages_of_recipes(tmp_path: Path, peers: list[str]) -> None:
    """In a process of its own: it needs omegaconf and wandb as little as the engine does, and fla-core to compare."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["omegaconf", "wandb", "matplotlib", "rich", *{peers}]))
from analysis.bench.ranks import network
from analysis.bench.__main__ import BENCHES, main
main(["linear", "--quick", "--out", {str(tmp_path)!r}])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = (tmp_path / "linear" / "report.md").read_text()
    assert report in run.stdout
    results = json.loads((tmp_path / "linear" / "results.json").read_text())
    assert {"command", "commit", "versions", "machine", "unit", "rows", "claims"} <= results.keys()
    measured = {(row["contender"], row["length"]) for row in results["rows"]}
    naive = ("fla-core naive_chunk_simple_gla", 128)
    assert (naive in measured) == (not peers) == ("skipped: fla-core" not in run.stderr)
    assert ("torch causal SDPA", 128) in measured
    assert {length for _, length in measured} == {128, 256} and len(measured) == 10 - bool(peers)
    assert all(len(row["values"]) == 2 and min(row["values"]) > 0 for row in results["rows"])
    assert len(results["claims"]) == report.count("| at ") == 4 - bool(peers)


@pytest.mark.slow
def test_kernels_run_without_the_packages_of_recipes_or_of_kernels(tmp_path: Path) -> None:
    """On a CPU every contender, step and phase is measured."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["omegaconf", "wandb", "matplotlib", "rich", "triton", "fla", "transformers"]))
from analysis.bench.__main__ import main
main(["kernels", "--quick", "--commit", "abc", "--out", {str(tmp_path)!r}])
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = (tmp_path / "kernels" / "report.md").read_text()
    assert report in run.stdout and "without a CUDA device" in report and "skipped: fla-core" in report
    results = json.loads((tmp_path / "kernels" / "results.json").read_text())
    assert results["commit"] == "abc" and results["claims"] == [] and results["device"] is None
    measured = {(row["contender"], row["length"]) for row in results["rows"]}
    shape = QUICK.kernels
    for heads, length, way in itertools.product(shape.heads, shape.lengths, ("forward", "forward + backward")):
        assert {(f"ours, {decay}, H={heads}, {way}", length) for decay in DECAYS} <= measured
        flash = (f"torch flash attention, H={heads}, {way}", length)
        assert (flash in measured) == (length <= shape.softmax_until)
    for length in shape.model_lengths:
        assert {("step, pure", length), ("step, 1/4 hybrid", length)} <= measured
        assert {(f"phase intra, {way}, decay scalar", length) for way in ("forward", "backward")} <= measured
    assert all(row["values"] and min(row["values"]) > 0 for row in results["rows"])
    assert not [note for note in results["notes"] if note.startswith("failed")]


@pytest.mark.slow
def test_our_kernels_are_measured_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton is not installed, or not set to interpret")
    model = {"dim": 16, "heads": 1}
    shape = replace(
        QUICK.kernels, lengths=(17,), heads=(1,), tuned_at=17, repetitions=1, model=model, model_lengths=(17,)
    )
    watch, notes = Stopwatch(torch.device("cpu")), []
    contenders, _ = found(watch.device, shape.softmax_until)
    cells, _ = kernels.measured(contenders, shape, watch, torch.float32, Budget(math.inf), notes)
    assert [cell.contender.decay for cell in cells] == [d for d in (*DECAYS, "softmax") for _ in range(2)]
    phases = hiding.phases(shape, watch, torch.float32, Budget(math.inf), notes)
    assert len(phases) == 12 and all(phase.values for phase in phases) and notes == []


def test_goals_are_held_on_the_shape_that_is_the_furthest_from_them() -> None:
    ours = Contender(name="ours, scalar", decay="scalar", call=torch.add)
    peer = Contender(name="fla chunk_simple_gla", decay="scalar", call=torch.add)
    cells = [
        kernels.Cell(contender=one, heads=16, length=length, way=way, values=[seconds])
        for one, length, way, seconds in (
            (ours, 4096, "forward", 1.0), (peer, 4096, "forward", 1.1),
            (ours, 65536, "forward", 10.0), (peer, 65536, "forward", 12.0),
            (ours, 4096, "forward + backward", 3.0), (peer, 4096, "forward + backward", 3.0),
            (ours, 65536, "forward + backward", 30.0), (peer, 65536, "forward + backward", 36.0),
        )
    ]  # fmt: skip
    moved = cells[0].work(128, 2)[0]
    assert moved == 16 * 4096 * (4 * 128 * 2 + 4)
    limits = Ceilings(copy=moved, matmul=1.0)
    faster, both, longer, none, fixed, share = (claim.line() for claim in kernels.goals(cells, limits, 128, 2))
    assert faster.startswith("| scalar decay, times faster than fla-core, forward; worst at H=16, T=4096 | 1.10 |")
    assert "worst at H=16, T=4096 | 1.00 | at least 1 | yes" in both
    assert "T >= 32K; worst at H=16, T=65536 | 1.20 | at least 1.3 | NO" in longer
    assert "worst at H=16, T=4096 | 1.00 | at least 0.5 | yes" in share
    assert none.endswith("worst at no shape: it failed | nan | at least 0.5 | NO |") and "fixed" in fixed


def test_a_contender_that_fails_is_noted_and_the_others_go_on() -> None:
    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    good = Contender(name="ours, none", decay="none", call=lambda q, k, v: q * k * v)
    bad = Contender(name="fla chunk_linear_attn", decay="none", call=fails)
    notes: list[str] = []
    watch = Stopwatch(torch.device("cpu"))
    cells, _ = kernels.measured([good, bad], QUICK.kernels, watch, torch.float32, Budget(math.inf), notes)
    assert {cell.contender.name for cell in cells} == {"ours, none"} and all(cell.values for cell in cells)
    assert notes == ["failed: fla chunk_linear_attn: RuntimeError: no kernel image"]
    assert kernels.measured([good], QUICK.kernels, watch, torch.float32, Budget(0.0), notes)[0] == []
    assert "not measured, out of time: ours, none" in notes


def test_the_modelled_exchange_is_the_ledgers_formula() -> None:
    summary = Summary(heads=16, key=128, value=128, transition="scalar")
    assert hiding.received(summary, 8, 2, "forward") == 7 * 2 * 16 * (128 * 128 + 1) * 4
    assert hiding.received(summary, 64, 1, "backward") == 63 * 16 * 128 * 128 * 4


@pytest.mark.slow
def test_delta_and_mixers_measure_every_contender(tmp_path: Path) -> None:
    main(["delta", "mixers", "--quick", "--out", str(tmp_path)])
    delta, mixers = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("delta", "mixers"))
    contenders = {row["contender"] for row in delta["rows"]}
    assert {"delta_rule [B,T,H]", "transformers torch_chunk_gated_delta_rule"} <= contenders
    linear = {name for name, spec in MIXERS.items() if spec.letter == "L"}
    assert {row["contender"] for row in mixers["rows"]} == linear
    assert len(mixers["claims"]) == len(linear)


@pytest.mark.slow
def test_model_compares_two_ranks_with_one_process(tmp_path: Path) -> None:
    main(["model", "--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    sp, one = (row["values"] for row in results["rows"])
    assert len(sp) == len(one) == 1
    assert results["claims"][0]["measured"] == pytest.approx(sp[0] / one[0])
    for folder in ("sp2-one-thread-each-0", "one-process-two-threads-0"):
        provenance = json.loads((tmp_path / "model" / folder / "provenance.json").read_text())
        assert provenance["sp"] == (2 if folder.startswith("sp2") else 1)


@pytest.mark.slow
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


@pytest.mark.slow
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
