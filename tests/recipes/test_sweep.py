"""The sweep: cells and their merging, skipping, resuming, failures, the lock, and what an interrupt leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from recipes import config, lock, sweep
from recipes.load import dump, load_recipe
from recipes.sweep import Cell, Sweep

ROOT = Path(__file__).parents[2]
BASE = "model: {dim: 16, depth: 4, heads: 2}\ntrain: {steps: 2}\nwandb: {mode: disabled}\n"
AXES = "axes:\n  model.ratio: [1/2, 1]\n  model.linear: [lightning, gla]\n"

# A trainer that reads from plan.json what to do for each run name, and notes in starts.txt that it was started.
TRAINER = """
import json, os, sys, time
from pathlib import Path
name = next(word for word in sys.argv if word.startswith("name=")).removeprefix("name=")
todo = json.loads(Path("plan.json").read_text())[name]
folder = Path(todo["folder"])
with open("starts.txt", "a") as file:
    file.write(f"{name} {os.getpid()}\\n")
if "resume: never" in todo["recipe"] and (folder / "provenance.json").exists():  # as the program does
    os.rename(folder, f"{folder}.old-1")
    folder.mkdir()
(folder / "recipe.yaml").write_text(todo["recipe"])
(folder / "provenance.json").write_text("{}")
do = todo["do"]
if do == "crash":
    print("the disk is full")
    print("E0101 00:00:00 1 torch/distributed/elastic/multiprocessing/api.py:1] failed (exitcode: 1)")
    sys.exit("ChildFailedError")
sweep = os.getppid()
while do == "hang" or do == "hold" and not Path("go.txt").exists():
    time.sleep(0.02)
    if os.getppid() != sweep:
        sys.exit("the sweep is gone")
if do != "stop":
    result = {"status": "finished", "bits_per_byte": 2.5, "below_unigram": 0.4}
    (folder / "summary.json").write_text(json.dumps(result))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base recipe, a sweep file and the trainer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "stand_in.py").write_text(TRAINER)
    write(tmp_path, AXES)
    return tmp_path


def write(place: Path, text: str) -> Path:
    (place / "trial.yaml").write_text(f"name: trial\nbase: base.yaml\n{text}")
    return place / "trial.yaml"


def planned(place: Path, *overrides: str) -> tuple[Sweep, list[Cell]]:
    loaded = sweep.load(place / "trial.yaml", overrides)
    return loaded, sweep.plan(loaded, place / "trial.yaml")


def train(place: Path, *overrides: str, **do: str) -> list[sweep.Outcome]:
    """Run the sweep with the stand-in trainer; `do` says what a cell does instead of finishing at once."""
    loaded, cells = planned(place, *overrides)
    todo = {
        cell.recipe.name: {
            "folder": str(cell.folder),
            "recipe": dump(cell.recipe),
            "do": do.get(cell.name.replace("-", "_"), do.get("every", "finish")),
        }
        for cell in cells
    }
    (place / "plan.json").write_text(json.dumps(todo))
    return sweep.run(loaded, place / "trial.yaml", cells, "the command", module="stand_in")


def starts(place: Path) -> list[str]:
    file = place / "starts.txt"
    return [line.split()[0].removeprefix("trial/") for line in file.read_text().splitlines()] if file.exists() else []


NAMES = ["ratio-1-2_linear-lightning", "ratio-1-2_linear-gla", "ratio-1"]


# The plan


def test_the_hybrid_ratio_ablation_is_eleven_runs_in_one_wandb_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = Path("recipes/ablations/hybrid_ratio.yaml")
    loaded = sweep.load(file)
    cells = sweep.plan(loaded, file)
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) == 11
    assert "ratio-1" in names
    seeds = {cell.recipe.train.seed for cell in cells if cell.name.startswith("ratio-1-4_linear-gla")}
    assert len(seeds) == 3
    assert {cell.recipe.name.split("/")[0] for cell in cells} == {"hybrid_ratio"}
    bytes_read = {cell.recipe.train.steps * cell.recipe.train.batch * cell.recipe.data.length for cell in cells}
    assert len(bytes_read) == 1


def test_cells_without_a_linear_block_are_one_run(place: Path) -> None:
    _, cells = planned(place)
    assert [cell.name for cell in cells] == NAMES
    assert cells[-1].covers == tuple({"model.ratio": "1", "model.linear": kind} for kind in ("lightning", "gla"))
    assert cells[-1].folder == Path("runs/trial/ratio-1")


def test_cells_are_merged_by_what_they_resolve_to(place: Path) -> None:
    write(place, "axes:\n  model.ratio: [1/2, 2/4]\n  model.pattern: [null, LN, [lightning, softmax]]\n")
    assert [cell.name for cell in planned(place)[1]] == ["all"]
    write(place, "axes:\n  model.linear: [lightning, gla]\n  model.mixers: [{}, {gla: {expand_k: 1.0}}]\n")
    shapes = [len(cell.covers) for cell in planned(place)[1]]
    assert shapes == [2, 1, 1], "an option of gla does not matter where there is no gla"


def test_cells_that_differ_in_the_rest_of_the_recipe_stay_apart(place: Path) -> None:
    write(place, "axes:\n  model.linear: [lightning, gla]\n  optim.lr: [1e-3, 2e-3]\nset: {model.ratio: 1}\n")
    _, cells = planned(place)
    assert [cell.name for cell in cells] == ["lr-1e-3", "lr-2e-3"]
    assert [cell.recipe.optim.lr for cell in cells] == [1e-3, 2e-3]


def test_strategies_are_an_axis_like_any_other(place: Path) -> None:
    write(
        place,
        "axes:\n  parallel.linear: [all_gather, ring]\n  parallel.overlap: [true, [softmax]]\nset: {model.ratio: 1/2}",
    )
    loaded, cells = planned(place, "nproc=2")
    names = ["linear-all-gather_overlap-true", "linear-ring_overlap-true", "linear-ring_overlap---softmax--"]
    assert [cells[i].name for i in (0, 2, 3)] == names and len({cell.folder for cell in cells}) == 4
    assert [cell.recipe.parallel.linear for cell in cells] == ["all_gather", "all_gather", "ring", "ring"]
    assert cells[3].recipe.parallel.overlap == ["softmax"] and loaded.nproc == 2


def test_the_ablation_of_strategies_is_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = Path("recipes/ablations/strategies.yaml")
    cells = sweep.plan(sweep.load(file), file)
    assert {cell.recipe.parallel.linear for cell in cells} >= {"all_gather", "ring", "pipeline", "doubling"}
    assert all(config.difference(cells[0].recipe, cell.recipe) == [] for cell in cells), "the same training"


def test_strategies_of_layers_that_are_not_there_are_one_run(place: Path) -> None:
    write(place, "axes:\n  model.ratio: [0, 1]\n  parallel.linear: [all_gather, ring]\n  parallel.keep_kv: [true]\n")
    assert [cell.name for cell in planned(place)[1]] == [
        "ratio-0_linear-all-gather_keep-kv-true",
        "ratio-0_linear-ring_keep-kv-true",
        "ratio-1_keep-kv-true",
    ]


def test_extra_seeds_belong_to_one_cell(place: Path) -> None:
    write(place, AXES + "seeds:\n  cell: {model.ratio: 1/2, model.linear: gla}\n  values: [0, 5]\n")
    _, cells = planned(place)
    assert [cell.name for cell in cells] == [*NAMES, "ratio-1-2_linear-gla_seed-5"], "seed 0 is the cell itself"
    assert cells[-1].recipe.train.seed == 5
    assert cells[-1].recipe.model == cells[1].recipe.model


def test_overrides_reach_every_run(place: Path) -> None:
    write(place, AXES + "set: {train.steps: 7}\n")
    loaded, cells = planned(place, "train.steps=9", "name=other", "parallel=2", "optim.betas=[0.8, 0.9]")
    assert loaded.parallel == 2
    assert {cell.recipe.train.steps for cell in cells} == {9}
    assert {tuple(cell.recipe.optim.betas) for cell in cells} == {(0.8, 0.9)}
    assert cells[0].folder == Path("runs/other/ratio-1-2_linear-lightning")


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (AXES, "train.steps", "key=value"),
        (AXES, "train.stepps=3", r"cell ratio-1-2_linear-lightning .*train\.stepps.*train\.steps"),
        (AXES, "model.ratio=1/4", "model.ratio is an axis"),
        (AXES, "nproc=two", "nproc|Integer"),
        (AXES, "parallel=0", "parallel is 0; it must be at least 1"),
        (AXES + "axis: {}", "nproc=1", "Did you mean"),
        ("nproc: 2\n", "nproc=1", "axes must hold at least one key"),
        ("axes: {model.ratio: [1/3]}\n", "nproc=1", "cell ratio-1-3 .*does not tile"),
        ("axes: {model.ratio: [1/2]}\n", "data.length=3", "cell ratio-1-2 .*data.length=3"),
        (AXES + "seeds: {cell: {model.ratio: 1/2}, values: [1]}\n", "nproc=1", "names 2 cells"),
        (AXES + "seeds: {cell: {model.ratio: 1/8}, values: [1]}\n", "nproc=1", "names 0 cells"),
        ("axes: {model.ratio: [1/4\n", "nproc=1", r"trial.yaml: not valid YAML: .* in line 4"),
        (AXES + "set: {data.files: *.txt}\n", "nproc=1", r"trial.yaml: not valid YAML: .* in line 6, .*quotes"),
        (AXES + "set: {wandb.project: 'a: b'}\n", "nproc=1", r"cell ratio-1-2_linear-lightning .*wandb.project='a: b'"),
        (AXES + "set: {model.pattern: '[LN'}\n", "nproc=1", r"cell ratio-1-2_linear-lightning .*is not valid YAML"),
        (AXES + "set: {out: '${oc.env:HOME}'}\n", "nproc=1", r"holds \$\{\.\.\.\}"),
        (AXES, "name=${oc.env:HOME}", r"holds \$\{\.\.\.\}"),
        (AXES, "out=${oc.env:HOME}", r"holds \$\{\.\.\.\}"),
        ("axes: {model.pattern: ['${oc.env:HOME}']}\n", "nproc=1", r"holds \$\{\.\.\.\}"),
        (AXES, "name=", "nothing behind the ="),
        (AXES, "train.steps=", "nothing behind the ="),
    ],
)
def test_a_faulty_sweep_says_what_to_change(place: Path, text: str, override: str, message: str) -> None:
    write(place, text)
    words = ["nproc=2", override]
    with pytest.raises(ValueError, match=message) as caught:
        planned(place, *words)
    assert "\n" not in str(caught.value)
    assert not (place / "runs").exists()


def test_values_are_what_was_written(place: Path) -> None:
    """A sweep's values get their type from the recipe's key: a name of digits stays what it is, a number is decimal."""
    (place / "trial.yaml").write_text(
        "name: 0012\nbase: base.yaml\n"
        "axes: {data.files: [0010, '*.txt', true, 1e5], parallel.overlap: [true, [softmax]], train.steps: [010]}\n"
        "set: {model.mixers: {gla: {expand_k: 1}}, model.ratio: 0.50, train.threads: null}\n"
        "seeds: {cell: {data.files: 0010, parallel.overlap: true}, values: [007]}\n"
    )
    loaded, cells = planned(place)
    assert loaded.name == "0012" and cells[0].folder == Path("runs/0012/files-0010_overlap-true_steps-010")
    assert [cell.recipe.data.files for cell in cells[:-1:2]] == ["0010", "*.txt", "true", "1e5"]
    assert [cell.recipe.parallel.overlap for cell in cells[:2]] == [True, ["softmax"]]
    assert {cell.recipe.train.steps for cell in cells} == {10}
    assert cells[0].recipe.model.mixers == {"gla": {"expand_k": 1.0}} and cells[0].recipe.model.ratio == "0.50"
    written = sweep.load(place / "trial.yaml", ["name=0010", "nproc=02", "model.linear=0010", "data.test=*.txt"])
    assert (written.name, written.nproc) == ("0010", 2)
    assert (written.set["model.linear"], written.set["data.test"]) == ("0010", "*.txt")


def test_cells_of_long_values_have_names_that_fit(place: Path) -> None:
    mixers = ", ".join(["gla"] * 99)
    write(place, f"axes:\n  model.pattern: [[{mixers}, gla], [{mixers}, softmax]]\nset: {{model.depth: 100}}\n")
    _, cells = planned(place)
    assert len({cell.name for cell in cells}) == 2 and all(len(cell.name) <= 240 for cell in cells)


def test_a_missing_file_and_a_missing_base(place: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        sweep.load("nowhere.yaml")
    (place / "base.yaml").unlink()
    with pytest.raises(ValueError, match="base.yaml"):
        planned(place)


def test_one_rank_is_plain_and_more_are_torchrun(place: Path) -> None:
    loaded, cells = planned(place)
    argv = sweep.command(loaded, place / "trial.yaml", cells[0])
    assert argv[1:4] == ["-m", "recipes.train", "base.yaml"]
    loaded, cells = planned(place, "nproc=2")
    argv = sweep.command(loaded, place / "trial.yaml", cells[0])
    assert argv[2] == "torch.distributed.run"
    assert argv[argv.index("--nproc-per-node=2") :][:4] == ["--nproc-per-node=2", "-m", "recipes.train", "base.yaml"]
    assert load_recipe("base.yaml", argv[argv.index("base.yaml") + 1 :]) == cells[0].recipe


# The runs


def test_finished_runs_are_skipped(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [outcome.state for outcome in train(place)] == ["finished"] * 3
    assert starts(place) == NAMES
    assert "[3/3] ratio-1: finished after" in capsys.readouterr().out
    assert [outcome.state for outcome in train(place)] == ["skipped"] * 3
    assert len(starts(place)) == 3
    assert "2.500 bits per byte, 40.0 % below" in capsys.readouterr().out
    record = json.loads((place / "runs/trial/sweep.json").read_text())
    assert [cell["name"] for cell in record["cells"]] == NAMES
    assert record["command"] == "the command"


def test_runs_that_failed_or_stopped_are_started_again(place: Path) -> None:
    outcomes = train(place, ratio_1_2_linear_gla="crash", ratio_1="stop")
    assert [outcome.state for outcome in outcomes] == ["finished", "failed", "failed"]
    assert "exit code 1" in outcomes[1].note
    assert "summary.json does not say finished" in outcomes[2].note
    assert [outcome.state for outcome in train(place)] == ["skipped", "finished", "finished"]
    assert starts(place) == [*NAMES, NAMES[1], NAMES[2]]
    assert (place / "runs/trial/ratio-1-2_linear-gla/train.log").read_text().count("$ python") == 2


def test_a_changed_recipe_is_an_error_before_anything_runs(place: Path) -> None:
    train(place, every="stop")
    train(place, ratio_1="stop")
    before = starts(place)
    with pytest.raises(ValueError, match=r"another recipe \(train.steps was 2, now 3\); delete that folder .*name="):
        train(place, "train.steps=3")
    assert starts(place) == before
    assert [outcome.state for outcome in train(place, "wandb.mode=offline")].count("skipped") == 2
    assert [outcome.state for outcome in train(place, "train.steps=3", "name=longer")] == ["finished"] * 3


def test_failures_end_the_report_with_the_tail_of_their_log(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(place, ratio_1="stop")
    (place / "runs/trial/ratio-1/train.log").write_text("$ python once\nan older failure\n")
    code = sweep.report(train(place, ratio_1="crash"), seconds=1.0)
    out = capsys.readouterr().out
    assert code == 1
    assert "ratio-1 failed (exit code 1)" in out
    assert "  | the disk is full\n" in out
    assert "an older failure" not in out, "only the last attempt is shown"
    assert "torch/distributed" not in out and "ChildFailedError" not in out
    assert "0 finished, 2 skipped, 1 failed" in out
    assert sweep.report(train(place), seconds=1.0) == 0


def test_a_cell_that_fails_again_under_resume_never_keeps_its_log(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anew = "checkpoint.resume=never"
    train(place, anew, every="crash")
    assert sweep.report(train(place, anew, every="crash"), seconds=1.0) == 1
    assert capsys.readouterr().out.count("  | the disk is full\n") == 3
    assert {path.name for path in (place / "runs/trial").glob("*.old-*")} == {f"{name}.old-1" for name in NAMES}


def test_a_cell_in_which_another_process_trains_is_left_to_say_so(place: Path) -> None:
    folder = place / "runs/trial" / NAMES[0]
    train(place, "checkpoint.resume=never", every="stop")
    with lock.hold(folder):
        loaded, cells = planned(place, "checkpoint.resume=never")
        with sweep.locked(folder.parent) as held:
            assert sweep.start([sys.executable, "-c", "print('refused')"], cells[0], held).wait() == 0
    assert (folder / "train.log").read_text().endswith("refused\n") and (folder / "provenance.json").exists()


def test_a_broken_summary_is_named(place: Path) -> None:
    train(place)
    summary = place / "runs/trial" / NAMES[0] / "summary.json"
    summary.write_text("")
    with pytest.raises(ValueError, match=rf"{NAMES[0]}/summary.json cannot be read: .*; delete it"):
        train(place)
    summary.write_text('{"status": "finished", "bits_per_byte": 0.1, "below_unigram": null}')
    assert train(place)[0].note == "0.100 bits per byte"


def test_dry_run_prints_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([str(place / "trial.yaml"), "--dry-run", "train.steps=3"]) == 0
    out = capsys.readouterr().out
    assert "3 runs in runs/trial, 1 at a time, 1 rank each" in out
    assert all(name in out for name in NAMES)
    assert not (place / "runs").exists()
    assert sweep.main(["nowhere.yaml"]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("parallel", [1, 2])
def test_as_many_runs_at_a_time_as_asked(place: Path, parallel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run ends before the sweep, having started what it would, waits for one to end."""
    write(place, "axes: {model.ratio: [0, 1/2, 1]}\n")
    start, sleep = sweep.start, time.sleep
    started: list[subprocess.Popen[bytes]] = []
    at_once: list[int] = []

    def noted(*args: Any) -> subprocess.Popen[bytes]:
        started.append(start(*args))
        return started[-1]

    def waiting(seconds: float) -> None:
        at_once.append(sum(process.poll() is None for process in started))
        (place / "go.txt").touch()
        sleep(seconds)

    monkeypatch.setattr(sweep, "start", noted)
    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=waiting, monotonic=time.monotonic))
    assert [outcome.state for outcome in train(place, f"parallel={parallel}", every="hold")] == ["finished"] * 3
    assert at_once[0] == max(at_once) == parallel


# Two sweeps, and the end of one


def test_two_sweeps_cannot_share_a_folder(place: Path) -> None:
    with sweep.locked(place / "runs/trial"):
        with pytest.raises(ValueError, match=rf"another sweep works in .*process {os.getpid()}.*name="):
            train(place)
        assert starts(place) == []
        assert len(train(place, "name=other")) == 3
    assert len(train(place)) == 3


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_ends_the_run_in_flight(place: Path) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        if starts(place):
            raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(place, every="hang")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    pid = int((place / "starts.txt").read_text().split()[1])
    assert not alive(pid)
    assert [outcome.state for outcome in train(place)] == ["finished"] * 3


def test_a_run_that_outlives_its_sweep_keeps_the_folder_locked(place: Path) -> None:
    folder = place / "runs/trial"
    loaded, cells = planned(place)
    with sweep.locked(folder) as lock:
        orphan = sweep.start([sys.executable, "-c", "import time; time.sleep(600)"], cells[0], lock)
    try:
        with pytest.raises(ValueError, match="a run that it left behind"):
            train(place)
    finally:
        orphan.kill()
        orphan.wait()
    assert len(train(place)) == 3
