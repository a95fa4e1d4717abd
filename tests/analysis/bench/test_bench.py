"""The benchmark program on tiny sizes: what it measures, writes and claims."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from analysis.bench.__main__ import BENCHES, main
from analysis.bench.device import Ceilings
from analysis.bench.gpu import operators, overlap_model
from analysis.bench.gpu.contenders import DECAYS, Contender, find_contenders
from analysis.bench.ranks import network, strategies
from analysis.bench.ranks.launch import launch
from analysis.bench.ranks.memory import KINDS
from analysis.bench.result import Claim, Row
from analysis.bench.sizes import QUICK
from analysis.bench.stopwatch import Budget, Stopwatch
from layers.cost import Summary
from layers.registry import MIXERS
from tests.support.packages import needs

ROOT = Path(__file__).parents[3]
RECIPES = ("omegaconf", "wandb", "matplotlib", "rich")  # packages of recipes and reports
PEERS = ("triton", "fla", "transformers")
SHORT = ("linear", "experts", "kernels", "balance", "launches", "tune")
LONG = ("limit", "delta", "mixers", "strategies", "overlap", "exchange_vs_length", "memory")
NAIVE, CHUNKED = "fla-core naive_chunk_simple_gla", "transformers torch_chunk_gated_delta_rule"
MIXER_COUNT = sum(spec.letter == "L" for spec in MIXERS.values())
ROWS = {  # without peers: lengths, heads, passes, decays and so on, multiplied
    "limit": (1 + 5) + 2 + 2 * 2 + 2 + 5 * 8 + 2,
    "linear": 2 * 4 + 1,
    "experts": 2 * 2,
    "delta": 2 * 3,
    "mixers": 2 * MIXER_COUNT,
    "strategies": 3 * len(strategies.LINEAR) - 1 + len(strategies.SOFTMAX),
    "overlap": 2 * 2,
    "balance": 2,
    "exchange_vs_length": 2 * 2,
    "memory": 2 * 2 * len(KINDS),
    "launches": 0,
    "tune": 0,
    "kernels": 2 * 2 * 2 * len(DECAYS) + 2 * 2 + 2 * 2 + 2 * 2 * 2 * len(overlap_model.PHASES),
}
CLAIMS = {"limit": 5 + 1 + 1 + 2 + 1, "linear": 3, "experts": 2, "delta": 1, "mixers": MIXER_COUNT, "strategies": 7,
          "overlap": 8, "balance": 1, "exchange_vs_length": 1, "memory": len(KINDS) + 1, "launches": 0, "tune": 0,
          "kernels": 0}  # fmt: skip


def run_without(packages: tuple[str, ...], names: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run benchmarks in a process that cannot import the packages, nor can the ranks that it starts."""
    lines = f"import sys\nsys.modules.update(dict.fromkeys({packages}))\n"  # importing None raises ImportError
    (folder / "sitecustomize.py").write_text(lines)
    environment = os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "analysis.bench", *names, "--quick", "--commit", "abc", "--out", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run


def read(folder: Path, name: str) -> dict[str, Any]:
    results = json.loads((folder / name / "results.json").read_text())
    assert {"command", "commit", "versions", "machine", "unit", "rows", "claims"} <= results.keys()
    assert all(row["values"] and min(row["values"]) > 0 for row in results["rows"])
    return results | {"measured": {(row["contender"], row["length"]) for row in results["rows"]}}


def test_every_benchmark_is_one_that_runs_without_optional_packages_or_trains() -> None:
    """Nor does the program import any of them at its start; torch itself imports triton."""
    assert {*SHORT, *LONG, "model"} == BENCHES.keys()
    code = f"import analysis.bench.__main__, sys; print({{*{(*RECIPES, *PEERS[1:])}}} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


@pytest.mark.parametrize("names", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def test_benchmarks_run_without_optional_packages(tmp_path: Path, names: tuple[str, ...]) -> None:
    """On a CPU every contender but the peers is measured, and kernels are measured but nothing is claimed of them."""
    run = run_without((*RECIPES, *PEERS), names, tmp_path)
    for name in names:
        results, report = read(tmp_path, name), (tmp_path / name / "report.md").read_text()
        assert report in run.stdout and len(results["claims"]) == CLAIMS[name], report
        assert report.count("| at most ") + report.count("| at least ") == CLAIMS[name], report
        assert len(results["measured"]) == len(results["rows"]) == ROWS[name], results["measured"]
        assert results["commit"] == "abc" and results["device"] is None
        skipped = {"kernels": ["skipped:"], "launches": ["skipped:"] * 2, "tune": ["nothing"]}.get(name, [])
        assert [note.split()[0] for note in results.get("notes", [])] == skipped
        bytes_ = [claim for claim in results["claims"] if "bytes received" in claim["what"] or name == "memory"]
        assert all(claim["measured"] <= claim["at_most"] for claim in bytes_)
    skipped = {line.split(" (")[0] for line in run.stderr.splitlines() if line.startswith("skipped: ")}
    missing = [NAIVE] if names == SHORT else [CHUNKED, "strategies.png", "exchange_vs_length.png"]
    assert skipped == {f"skipped: {one}" for one in missing}


@pytest.mark.slow
@needs("fla", "triton", "transformers")
def test_operators_are_compared_with_their_peers(tmp_path: Path) -> None:
    run = run_without(RECIPES, ("linear", "delta"), tmp_path)
    for name, peer in (("linear", NAIVE), ("delta", CHUNKED)):
        results = read(tmp_path, name)
        assert (peer, 128) in results["measured"] and len(results["rows"]) == ROWS[name] + 1
        assert len(results["claims"]) == CLAIMS[name] + 1
    assert "skipped" not in run.stderr


@pytest.mark.slow
def test_our_kernels_are_measured_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton is not installed, or not set to interpret")
    from tests.support.interpreter import mend

    mend()
    model = {"dim": 16, "heads": 1}
    shape = replace(
        QUICK.kernels, lengths=(17,), heads=(1,), tuned_at=17, repetitions=1, model=model, model_lengths=(17,)
    )
    watch, notes = Stopwatch(torch.device("cpu")), []
    contenders, _ = find_contenders(watch.device, shape.softmax_until)
    cells: list[operators.Cell] = []
    operators.measure_operators(contenders, shape, watch, torch.float32, cells, [], notes)
    assert [cell.contender.decay for cell in cells] == [d for d in (*DECAYS, "softmax") for _ in range(2)]
    phases = overlap_model.measure_phases(shape, watch, torch.float32, Budget(math.inf), notes)
    assert len(phases) == 12 and all(phase.values for phase in phases) and notes == []


def test_goals_are_held_on_the_shape_that_is_the_furthest_from_them() -> None:
    ours = Contender(name="ours, scalar", decay="scalar", call=torch.add)
    peer = Contender(name="fla chunk_simple_gla", decay="scalar", call=torch.add)
    cells = [
        operators.Cell(contender=one, heads=16, length=length, passes=passes, values=[seconds])
        for one, length, passes, seconds in (
            (ours, 4096, "forward", 1.0), (peer, 4096, "forward", 1.1),
            (ours, 65536, "forward", 10.0), (peer, 65536, "forward", 12.0),
            (ours, 4096, "forward + backward", 3.0), (peer, 4096, "forward + backward", 3.0),
            (ours, 65536, "forward + backward", 30.0), (peer, 65536, "forward + backward", 36.0),
        )
    ]  # fmt: skip
    moved = cells[0].work(128, 2)[0]
    assert moved == 16 * 4096 * (4 * 128 * 2 + 4)
    limits = Ceilings(copy=moved, matmul=1.0)
    faster, both, longer, none, fixed, share = (
        " | ".join(claim.cells()) for claim in operators.goals(cells, limits, 128, 2)
    )
    assert faster.startswith("scalar decay, times faster than fla-core, forward; worst at H=16, T=4096 | 1.10 |")
    assert both.endswith("worst at H=16, T=4096 | 1.00 | at least 1 | yes")
    assert longer.endswith("T >= 32K; worst at H=16, T=65536 | 1.20 | at least 1.3 | NO")
    assert share.endswith("worst at H=16, T=4096 | 1.00 | at least 0.5 | yes")
    assert none.endswith("worst at no shape: it failed | nan | at least 0.5 | NO") and "fixed" in fixed


def test_a_contender_that_fails_is_noted_and_the_others_go_on() -> None:
    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    def has_no_backward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients")
        return q * k * v

    good = Contender(name="ours, none", decay="none", call=lambda q, k, v: q * k * v)
    bad = Contender(name="fla chunk_linear_attn", decay="none", call=fails)
    half = Contender(name="fla chunk_gla", decay="none", call=has_no_backward)
    notes: list[str] = []
    watch = Stopwatch(torch.device("cpu"))
    shape = replace(QUICK.kernels, heads=(1,), lengths=(48,))
    cells: list[operators.Cell] = []
    operators.measure_operators([bad, good, half], shape, watch, torch.float32, cells, [], notes)
    both = "forward + backward"
    assert {(cell.contender.name, cell.passes) for cell in cells} == {
        ("ours, none", "forward"), ("ours, none", both), ("fla chunk_gla", "forward")
    }  # fmt: skip
    assert all(cell.values for cell in cells)
    assert notes == [
        f"failed: fla chunk_linear_attn, {both}: RuntimeError: no kernel image",
        "failed: fla chunk_linear_attn, forward: RuntimeError: no kernel image",
        f"failed: fla chunk_gla, {both}: RuntimeError: no gradients",
    ]
    lines = [*operators.operator_lines(cells, Ceilings(1.0, 1.0), 16, 4)]
    assert len(lines) == 2 and lines[1][0] == "fla chunk_gla" and lines[1][4] == lines[1][6] == lines[1][9] == ""
    for seconds, what in (((0.0, 9.0), "ours, none"), ((9.0, 0.0), "H=2, T=96")):
        shape = replace(QUICK.kernels, seconds=(*seconds, 0.0, 0.0))
        none: list[operators.Cell] = []
        operators.measure_operators([good], shape, watch, torch.float32, none, [], notes)
        assert none == []
        assert notes[-1] == f"not measured, out of time: {what}"


def test_what_is_measured_before_a_signal_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other benchmark begins."""

    def ended(*_: Any) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(operators.train_step, "measure_steps", ended)
    monkeypatch.setattr(operators, "QUICK", replace(QUICK, kernels=replace(QUICK.kernels, heads=(1,), lengths=(48,))))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit) as end:
        main(["kernels", "balance", "--quick", "--out", str(tmp_path)])
    assert end.value.code == 143 and not (tmp_path / "balance").exists()
    results = read(tmp_path, "kernels")
    assert results["notes"][-1] == "cut: the rest was not measured" and len(results["rows"]) == 2 * (len(DECAYS) + 1)


def test_the_modelled_exchange_is_the_ledgers_formula() -> None:
    summary = Summary(heads=16, key=128, value=128, transition="scalar")
    assert overlap_model.received(summary, 8, "zigzag")[0] == 7 * 2 * 16 * (128 * 128 + 1) * 4
    assert overlap_model.received(summary, 64, "contiguous")[1] == 63 * 16 * 128 * 128 * 4


@pytest.mark.slow
def test_model_compares_two_ranks_with_one_process(tmp_path: Path) -> None:
    main(["model", "--quick", "--out", str(tmp_path)])
    results = read(tmp_path, "model")
    sp, one = (row["values"] for row in results["rows"])
    assert len(sp) == len(one) == 1
    assert results["claims"][0]["measured"] == pytest.approx(sp[0] / one[0])
    for folder in ("sp2-one-thread-each-0", "one-process-two-threads-0"):
        provenance = json.loads((tmp_path / "model" / folder / "provenance.json").read_text())
        assert provenance["sp"] == (2 if folder.startswith("sp2") else 1)


@pytest.mark.slow
def test_schedules_are_measured_on_a_pretended_link_where_none_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "impossible", lambda: "no root here")
    main(["overlap", "exchange_vs_length", "balance", "--quick", "--out", str(tmp_path)])
    for name, rows in (("overlap", 4), ("exchange_vs_length", 4), ("balance", 2)):
        results = read(tmp_path, name)
        assert len(results["rows"]) == rows and all(claim["measured"] > 0 for claim in results["claims"])
    for name in ("overlap", "exchange_vs_length"):
        report = (tmp_path / name / "report.md").read_text()
        assert "a pretended link of 200 Mbit/s and 0.1 ms (no root here)" in report
    with Image.open(tmp_path / "exchange_vs_length" / "exchange_vs_length.png") as picture:
        assert min(picture.size) > 300


def test_the_figure_of_strategies_is_drawn() -> None:
    rows = [Row(contender=f"{layer}: ring", length=8, values=[1e-3, 2e-3]) for layer in strategies.LAYERS]
    with Image.open(io.BytesIO(strategies._draw(rows, "four ranks"))) as picture:
        assert min(picture.size) > 300


def test_a_claim_says_whether_it_holds() -> None:
    assert Claim(what="faster", measured=3.6, at_least=3.5).cells() == ("faster", "3.60", "at least 3.5", "yes")
    assert Claim(what="faster", measured=3.4, at_least=3.5).cells()[-1] == "NO"
    assert Claim(what="growth", measured=1.3, at_most=1.2).cells()[-1] == "NO"


def test_the_first_rank_that_fails_ends_the_others() -> None:
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('no such thing'); time.sleep(3600)"
    with pytest.raises(RuntimeError, match="rank 1, exit code 1:\nno such thing"):
        launch([sys.executable, "-c", code], network.loopback(2))


def test_unknown_benchmarks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["linaer"])
    assert f"unknown benchmark linaer; known: {', '.join(BENCHES)}" in capsys.readouterr().err
