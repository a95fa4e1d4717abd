"""From a sweep file to the page, with the real trainer on two ranks."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import report, traffic
from analysis.runs import read_folder

ROOT = Path(__file__).parents[2]
SWEEP = """
name: trial
base: base.yaml
nproc: 2
axes: {model.ratio: [1/2], model.linear: [gated_delta_net]}
set: {data.length: 48, train.batch: 2, train.validation_sequences: 2, train.sample: 0, wandb.mode: disabled}
"""


def test_two_ranks_receive_what_the_cost_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("model: {dim: 16, depth: 2, heads: 2}\ntrain: {steps: 3, threads: 1}\n")
    Path("trial.yaml").write_text(SWEEP)
    words = [sys.executable, "-m", "recipes.sweep", "trial.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/1] ratio-1-2_linear-gated-delta-net: finished after" in done.stdout

    folder = read_folder("runs/trial")
    assert folder.faults == ()
    (run,) = folder.runs
    assert (run.pattern, run.linear, run.steps, run.tokens) == ("LN", "gated_delta_net", 3, 3 * 2 * 48)
    cut = traffic.setting(run)
    assert (cut.P, cut.spans, cut.B, cut.L) == (2, 2, 2, 48)
    assert report.main(["runs/trial"]) == 0
    text = Path("runs/trial/report/loss.md").read_text()
    row = next(
        line
        for line in text.splitlines()
        if line.startswith("|") and "|" in line and " gated_delta_net " in line and "+" in line
    )
    model, counted, difference = (int(cell.replace(",", "")) for cell in row.strip("| ").split("|")[-3:])
    assert difference == counted - model
    assert 0 <= difference <= 64, "a few sums of single numbers are not modelled"
    assert list(csv.DictReader(io.StringIO(Path("runs/trial/report/runs.csv").read_text())))[0]["run"] == run.name
