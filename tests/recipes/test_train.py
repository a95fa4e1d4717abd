"""The training program: the same run on any mesh, and a stop with a reason when something is wrong."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from layers.model import HybridLM
from recipes import config, data, generate, lock, record
from recipes.load import load_resolved
from recipes.record import read_metrics
from recipes.train import _stop_signals
from tests.recipes.conftest import Train, write_texts
from tests.recipes.program import ROOT, run_program
from tests.support.tiers import tiered

# float64 and a small constant rate: training amplifies rounding, and here it is to be seen alone.
EXACT = ["train.dtype=float64", "optim.lr=1e-4", "optim.schedule=constant", "optim.warmup=0"]


def losses(folder: Path) -> list[tuple[str, int, float]]:
    return [(line["kind"], line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl")]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="session")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a float64 run in one process."""
    out = tmp_path_factory.mktemp("alone")
    done = run_program(str(tiny), f"out={out}", "name=run", *EXACT, draws=True)
    assert done.ok, done
    return out / "run"


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    tiered(
        [
            (1, ["train.accumulation=4"]),
            (3, ["parallel.sp=3", "parallel.layout=contiguous"]),
            (4, ["parallel.dp=2", "parallel.sp=2"]),
        ],
        [
            (2, ["parallel.sp=2"]),
            (2, ["parallel.dp=2", "train.accumulation=2"]),
            (4, ["parallel.sp=4", "parallel.overlap=false"]),
        ],
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_mesh_and_accumulation_gives_the_same_run(
    ranks: int, overrides: list[str], train: Train, alone: Path, tmp_path: Path
) -> None:
    done = train(*EXACT, *overrides, ranks=ranks)
    assert done.ok, done
    got, want = losses(tmp_path / "run"), losses(alone)
    assert [line[:2] for line in got] == [line[:2] for line in want] and len(got) == 10
    assert [line[2] for line in got] == pytest.approx([line[2] for line in want], rel=1e-9)
    norms = [
        [line.get("grad_norm") for line in read_metrics(run / "metrics.jsonl")] for run in (tmp_path / "run", alone)
    ]
    assert [n for n in norms[0] if n] == pytest.approx([n for n in norms[1] if n], rel=1e-9)


def test_the_loss_is_the_mean_over_all_predicted_bytes(alone: Path) -> None:
    """The first loss by hand: untrained weights, the first step's windows, all bytes predicted but a window's first."""
    recipe = load_resolved(alone / "recipe.yaml")
    model = HybridLM(recipe.model)
    model.init_weights(recipe.train.seed)
    tokens = data.training_windows(data.read_corpus(recipe.data), 32, recipe.train.seed, 1, range(4)).tokens
    logits = model.double()(tokens)[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert losses(alone)[0][2] == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_files_are_read_as_if_alone(train: Train, tmp_path: Path, ranks: int) -> None:
    """The first loss of a packed run by hand: every document by itself, its first byte not predicted."""
    packed = ("data.pack=true", "data.length=1000", "train.batch=2", "train.steps=1", "train.sample=0", "train.seed=1")
    assert train(*EXACT, *packed, ranks=ranks).ok
    recipe = load_resolved(tmp_path / "run" / "recipe.yaml")
    model = HybridLM(recipe.model)
    model.init_weights(recipe.train.seed)
    windows = data.training_windows(data.read_corpus(recipe.data), 1000, recipe.train.seed, 1, range(2))
    assert len(windows.cu_seqlens) > 3
    total = torch.zeros(2, dtype=torch.float64)
    for start, end in itertools.pairwise(windows.cu_seqlens):
        tokens = windows.tokens.view(1, -1)[:, start:end]
        logits = model.double()(tokens)[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        total += torch.stack([loss.detach(), torch.tensor(float(end - start - 1))])
    assert losses(tmp_path / "run")[0][2] == pytest.approx((total[0] / total[1]).item(), rel=1e-9)


def test_validation_by_hand(alone: Path) -> None:
    recipe = load_resolved(alone / "recipe.yaml")
    tokens = data.validation_windows(data.read_corpus(recipe.data), 32, 4, range(4)).tokens
    with torch.no_grad():
        logits = generate.load_model(alone)(tokens)[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert summary_of(alone)["validation_loss"] == pytest.approx(want.item(), rel=1e-12)


def test_the_run_folder(alone: Path) -> None:
    recipe = load_resolved(alone / "recipe.yaml")
    lines, summary = read_metrics(alone / "metrics.jsonl"), summary_of(alone)
    train, validation = ([line for line in lines if line["kind"] == kind] for kind in ("train", "validation"))
    assert [line["tokens"] for line in train] == [128 * step for step in range(1, 9)]
    assert {"grad_norm", "lr", "tokens_per_second", "memory_mb", "comm/exposed_ms", "comm/calls", "comm/bytes"} < train[
        0
    ].keys()
    assert train[0]["comm/calls"] == 0 and train[0]["memory_mb"] > 50
    assert [line["step"] for line in validation] == [4, 8]
    assert validation[0]["bits_per_byte"] == pytest.approx(validation[0]["loss"] / math.log(2))
    assert summary["status"] == "finished" and summary["steps"] == 8 and summary["tokens"] == 8 * 128
    assert summary["train_loss"] == pytest.approx(sum(line["loss"] for line in train) / 8)
    assert summary["parameters"] == sum(p.numel() for p in generate.load_model(alone).parameters())
    assert summary["pattern"] == "LN" and summary["validation_loss"] == validation[-1]["loss"]
    assert summary["below_unigram"] == pytest.approx(1 - summary["bits_per_byte"] / summary["unigram_bits_per_byte"])
    provenance = json.loads((alone / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__ and (provenance["dp"], provenance["sp"]) == (1, 1)
    assert "commit" in provenance and (alone / "diff.patch").exists()
    assert (alone / "sample.txt").read_text().startswith("def ")
    assert Image.open(alone / "loss.png").size[0] > 600
    assert recipe.name == "run" and (alone / "checkpoints" / "latest").exists()


def test_communication_is_in_the_metrics(train: Train, tmp_path: Path) -> None:
    done = train("train.steps=3", ranks=2)
    assert done.ok, done
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    # One gather forward and one exchange backward in each of two layers; tokens, gradients and the loss.
    assert line["comm/calls"] == 2 * 2 + 3 and line["comm/bytes"] > 0 and line["comm/exposed_ms"] > 0
    assert "LN (gla, softmax)" in done.texts[0] and "dp 1 x sp 2, zigzag layout" in done.texts[0]
    last = next(text for text in done.texts[0].splitlines() if text.startswith("step      3/3  "))
    assert all(word in last for word in ("loss ", "grad norm ", "lr ", "tokens/s", "0:00 left")), last
    assert done.texts[1] == ""


def test_an_error_in_the_recipe_is_said_once_and_starts_nothing(tiny: Path, tmp_path: Path) -> None:
    done = run_program(str(tiny), f"out={tmp_path}", "model.heads=3", ranks=2)
    assert done.codes[0] == 2 and done.codes[1] != 0
    assert done.texts[0].startswith("error: model: ") and "3 heads" in done.texts[0] and done.texts[0].count("\n") == 1
    assert done.texts[1] == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "word"),
    tiered([("gradient is infinite", "gradient norm ")], [("loss is nan", "loss nan")]),
    ids=["gradient", "loss"],
)
def test_what_is_not_finite_on_one_rank_stops_all_at_that_step(
    fault: str, word: str, train: Train, tmp_path: Path
) -> None:
    done = train(ranks=2, fault=fault, rank=1, nth=3)
    assert done.codes == [1, 1], done
    assert f"error: step 3: {word}" in done.texts[0] or (word in done.texts[0] and "step 3" in done.texts[0]), done
    assert "Traceback" not in done.texts[0] and done.texts[1] == "", done
    assert [step for _, step, _ in losses(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-00000002"
    assert summary_of(tmp_path / "run")["status"] == "failed" and "step 3" in summary_of(tmp_path / "run")["error"]
    again = train(ranks=2)
    assert again.ok and summary_of(tmp_path / "run")["status"] == "finished", again


def test_parameters_that_differ_stop_the_run_and_are_named(train: Train, tmp_path: Path) -> None:
    done = train("parallel.dp=2", ranks=2, fault="parameter drifts", rank=1, nth=3)
    assert done.codes == [1, 1], done
    assert "error: step 4: parameter blocks.1.mlp.output.weight differs between ranks: ranks [0]" in done.texts[0], done
    assert done.texts[1] == "" and "Traceback" not in done.texts[0], done
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-00000002"


def test_sigterm_saves_and_ends_well_and_the_run_goes_on(train: Train, alone: Path, tmp_path: Path) -> None:
    done = train(*EXACT, ranks=2, fault="terminated in a step", rank=1, nth=3)
    assert done.ok and "stopped    4 steps" in done.texts[0], done
    assert summary_of(tmp_path / "run")["status"] == "stopped"
    again = train(*EXACT, ranks=2)
    assert again.ok and "resuming   after step 4" in again.texts[0], again
    assert [line[2] for line in losses(tmp_path / "run")] == pytest.approx(
        [line[2] for line in losses(alone)], rel=1e-9
    )
    third = train(*EXACT, ranks=2)
    assert third.ok and "is finished already" in third.texts[0] and third.texts[1] == "", third


def test_signals_of_schedulers_and_terminals_ask_for_an_end() -> None:
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in signals}  # which a shell may have ignored
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stop_signals() as asked:
            for number in signals:
                os.kill(os.getpid(), number)
        assert asked == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], "nohup's SIGHUP stays ignored"
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with _stop_signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
        assert asked == [signal.SIGHUP] and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_folder_with_another_run_is_refused_or_moved_aside(train: Train, tmp_path: Path) -> None:
    assert train("train.steps=3").ok
    other = train("train.steps=3", "model.depth=4")
    assert other.codes == [2] and "model.depth (2 -> 4)" in other.texts[0] and "name=ANOTHER_NAME" in other.texts[0]
    text = train("train.steps=3", f"data.files={write_texts(tmp_path / 'texts', seed=1)}")
    assert text.codes == [2] and "holds a run on another corpus" in text.texts[0]
    anew = train("train.steps=3", "model.depth=4", "checkpoint.resume=never")
    assert anew.ok, anew
    assert summary_of(tmp_path / "run")["pattern"] == "LNLN" and summary_of(tmp_path / "run.old-1")["pattern"] == "LN"


def test_a_run_of_another_format_is_neither_resumed_nor_read(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("train.steps=1", "train.sample=0").ok
    path = tmp_path / "run" / "recipe.yaml"
    assert path.read_text().startswith("format: 1\n")
    path.write_text(path.read_text().replace("format: 1\n", "format: 2\n"))
    again = train("train.steps=1", "train.sample=0")
    assert again.codes == [2] and generate.main([str(tmp_path / "run")]) == 2
    for said in (again.texts[0], capsys.readouterr().err):
        assert f"{path} is of format '2', and this version reads format 1;" in said
        assert said.startswith("error: ") and said.count("\n") == 1


def test_a_training_that_lives_is_neither_moved_nor_cleaned(train: Train, tmp_path: Path) -> None:
    """Its half-written checkpoint stays, and is cleaned away when it has ended."""
    saving = tmp_path / "run" / "checkpoints" / ".saving-step-00000002"
    saving.mkdir(parents=True)
    (tmp_path / "run" / "provenance.json").write_text("{}")
    with lock.hold(tmp_path / "run"):
        refused = train("checkpoint.resume=never", ranks=2)
        assert refused.codes[0] == 2 and refused.texts[1] == "", refused
        assert refused.texts[0].startswith(f"error: another process is training in {tmp_path / 'run'} (process ")
        assert saving.exists() and not list(tmp_path.glob("run.old-*"))
    anew = train("train.steps=1", "checkpoint.resume=never")
    assert anew.ok and (tmp_path / "run.old-1" / "checkpoints" / saving.name).exists() and not saving.exists(), anew


def test_a_training_that_an_earlier_version_started_is_respected(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as earlier:
        fcntl.flock(earlier, fcntl.LOCK_EX)
        refused = train(ranks=2)
        assert refused.codes[0] == 2 and "another process is training in" in refused.texts[0], refused
        assert refused.texts[1] == "" and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_text_that_changed_in_place_is_refused(train: Train, tiny: Path, tmp_path: Path) -> None:
    pattern = write_texts(tmp_path / "texts")
    assert train("train.steps=3", f"data.files={pattern}").ok
    with (tmp_path / "texts" / "one.txt").open("a") as file:
        file.write("more")
    changed = train("train.steps=3", f"data.files={pattern}")
    assert changed.codes == [2] and "holds a run on another corpus" in changed.texts[0], changed


def test_bfloat16_trains_and_resumes_exactly(train: Train, tmp_path: Path) -> None:
    assert train("train.dtype=bfloat16").ok
    whole = losses(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "whole")
    assert train("train.dtype=bfloat16", fault="killed in a step", nth=4).codes == [-9]
    done = train("train.dtype=bfloat16")
    assert done.ok and "resuming   after step 2" in done.texts[0], done
    assert losses(tmp_path / "run") == whole and whole[0][2] > whole[-1][2]


@pytest.mark.slow
def test_under_torchrun(tiny: Path, tmp_path: Path) -> None:
    """The plain command on two processes: a mistake is said once and gives exit code 2 to torchrun; a run is made."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "recipes.train",
    ]
    base = [*command, str(tiny), f"out={tmp_path}", "train.steps=3", "name=run"]
    wrong = subprocess.run([*base, "data.length=3"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert wrong.returncode != 0
    assert wrong.stderr.count("error: data.length=3 is shorter than the 4 spans") == 1, wrong.stderr
    assert "recipes/train.py" not in wrong.stderr and "exitcode  : 2" in wrong.stderr, wrong.stderr
    right = subprocess.run(base, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert right.returncode == 0, right.stderr
    assert "mesh       2 processes on cpu" in right.stdout and right.stdout.count("finished   3 steps") == 1
    command_line = json.loads((tmp_path / "run" / "provenance.json").read_text())["command"]
    assert command_line.startswith("torchrun --nproc-per-node 2 -m recipes.train ")


def test_the_picture_has_three_lines_and_labelled_axes(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    record.draw_loss(read_metrics(alone / "metrics.jsonl"), tmp_path / "loss.png", "title")
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("bytes read, millions", "loss, bits per byte")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:2] == ["training", "validation"] and labels[2].startswith("byte-unigram entropy (")
    assert [len(line.get_xdata()) for line in axes.lines[:2]] == [8, 2]


def test_metrics_of_steps_that_were_lost_are_cut_off(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": 1.0, "tokens": step} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "train", "st')
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
    recipe = config.Recipe(wandb=config.WandbConfig(mode="disabled"))
    (tmp_path / "provenance.json").write_text('{"wandb_id": "x"}')
    record.Record(tmp_path, recipe).begin(step=2)
    assert read_metrics(tmp_path / "metrics.jsonl") == lines[:2]
