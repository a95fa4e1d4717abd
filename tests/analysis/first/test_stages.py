"""The first run on a device: its stages end in time, and what is done is in the report whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.first import plan, stages
from analysis.first.__main__ import main
from analysis.first.stages import Run, Stage

ROOT = Path(__file__).parents[3]
FOREVER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)"
FOREVER += "; time.sleep(3600)"


def stage(name: str, code: str, share: float = 1.0) -> Stage:
    return Stage(name=name, about=f"runs {name}", command=[sys.executable, "-c", code, "{folder}"], share=share)


def read(folder: Path) -> dict[str, Any]:
    assert not list(folder.glob(".*.new"))
    return json.loads((folder / "results.json").read_text())["stages"]


def pids_of(marker: str) -> list[int]:
    """The processes with this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [int(path.parent.name)] * (marker in path.read_text().split("\0"))
    return found


def test_every_outcome_is_told_and_the_next_stage_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that hangs is killed with all its processes, though it ignores the request to end."""
    monkeypatch.setattr(stages, "GRACE", 0.2)
    marker = f"marker-{os.getpid()}"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {FOREVER!r}, {marker!r}]); {FOREVER}"
    report = "import pathlib, sys; pathlib.Path(sys.argv[1], 'report.md').write_text('## found much'); print('done')"
    ran = Run(
        [
            stage("good", report, share=100),
            stage("bad", "print('why'); print(); raise SystemExit(3)", share=100),
            stage("poor", "print('needs CUDA'); raise SystemExit(77)", share=100),
            stage("hung", child, share=3),
            stage("last", "print('still here')", share=100),
        ],
        tmp_path,
        60.0,
        {"commit": "abc"},
    )
    assert not ran.run()
    found = read(tmp_path)
    outcomes = {name: one["outcome"] for name, one in found.items()}
    assert outcomes == {
        "good": "passed", "bad": "failed (3)", "poor": "skipped", "hung": "too late", "last": "passed"
    }  # fmt: skip
    assert [found[name]["last"] for name in ("good", "bad", "poor", "last")] == [
        "done",
        "why",
        "needs CUDA",
        "still here",
    ]
    assert found["hung"]["limit"] < 5 < found["last"]["limit"]
    assert all(one["commit"] == "abc" for one in found.values())
    assert not pids_of(marker)
    text = (tmp_path / "report.md").read_text()
    assert "## found much" in text and "# good: passed" in text and "# last" not in text
    assert text.count("The end of its log:") == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(found)


def test_time_that_is_not_used_goes_to_later_stages(tmp_path: Path) -> None:
    ran = Run([stage("first", ""), stage("second", "")], tmp_path, 100.0, {})
    assert ran.run()
    first, second = (one["limit"] for one in read(tmp_path).values())
    assert 49 < first <= 50 and 50 < second <= 100


def test_a_stage_runs_beside_others_until_the_one_that_ends_it(tmp_path: Path) -> None:
    """The one that is done by then passes; the other does not, and takes no share of the time."""
    begin = "import os, pathlib, sys, time; here = pathlib.Path(sys.argv[1]); there = here.parent / 'quick' / 'pid'"
    writes = f"{begin}; there.with_name('new').write_text(str(os.getpid())); there.with_name('new').rename(there)"
    waits = f"""{begin}
while not there.exists() or pathlib.Path(f'/proc/{{there.read_text()}}/stat').read_text().split()[2] != 'Z':
    time.sleep(0.01)"""
    quick = replace(stage("quick", writes, 0), until="third")
    slow = replace(stage("slow", "import time; print('ready'); time.sleep(3600)", 0), until="third")
    last = replace(stage("last", "", 0), until="nothing")
    ran = Run([quick, slow, stage("second", waits), stage("third", ""), last], tmp_path, 60.0, {})
    assert not ran.run()
    outcomes = {name: one["outcome"] for name, one in read(tmp_path).items()}
    assert outcomes == dict.fromkeys(outcomes, "passed") | {"slow": "too late"}
    assert 29 < read(tmp_path)["second"]["limit"] <= 30
    assert not pids_of(str(tmp_path / "slow"))


def test_no_stage_begins_after_the_end(tmp_path: Path) -> None:
    assert not Run([stage("first", "")], tmp_path, 0.0, {}).run()
    assert read(tmp_path)["first"]["outcome"] == "waiting"


def test_another_run_replaces_the_stages_that_it_runs(tmp_path: Path) -> None:
    assert not Run([stage("one", "raise SystemExit(1)"), stage("two", "")], tmp_path, 60.0, {"commit": "old"}).run()
    assert Run([stage("one", "")], tmp_path, 60.0, {"commit": "new"}).run()
    found = read(tmp_path)
    assert [(name, one["outcome"], one["commit"]) for name, one in found.items()] == [
        ("one", "passed", "new"),
        ("two", "passed", "old"),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_what_is_done_is_in_the_report_if_the_run_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    marker = f"ended-{os.getpid()}"
    code = f"""
import sys
from pathlib import Path
from analysis.first.stages import Run, Stage, end_on_signals
end_on_signals()
command = [sys.executable, "-c"]
stages = [
    Stage(name="done", about="", command=[*command, "print('a result')"], share=1),
    Stage(name="hung", about="", command=[*command, "import time; print('ready', flush=True); time.sleep(60)",
                                          {marker!r}], share=9),
    Stage(name="never", about="", command=[*command, ""], share=1),
]
Run(stages, Path({str(tmp_path)!r}), 120.0, {{}}).run()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    log = tmp_path / "hung" / "log.txt"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    code_of = process.wait(30)
    found = read(tmp_path)
    assert found["done"]["last"] == "a result" and found["never"]["outcome"] == "waiting"
    if number == signal.SIGTERM:
        assert code_of == 128 + number and found["hung"]["outcome"] == "cut" and found["hung"]["last"] == "ready"
        assert not pids_of(marker)
    else:
        assert found["hung"]["outcome"] == "running"
        os.killpg(*pids_of(marker), signal.SIGKILL)


def test_the_plan_is_whole_and_its_programs_exist() -> None:
    everything = [*plan.one_device(None), *plan.several_ranks(2, "cuda")]
    assert len({one.name for one in everything}) == len(everything) == 8 + 10
    assert sum(one.share for one in plan.one_device(None)) == pytest.approx(580)
    assert all("--commit" in one.command for one in plan.one_device("abc") if "analysis.bench" in one.command)


def test_a_stage_that_is_not_in_the_plan_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "no stage speed; there are machine, compile, correct, syncs" in capsys.readouterr().err


def test_the_program_runs_a_stage_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What this machine cannot run has not passed; the facts of the machine are there all the same."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        assert main(["machine", "--out", str(tmp_path), "--commit", "abc"]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["machine", "skipped"] and lines[0].endswith("needs CUDA")
    assert lines[1] == f"not all passed: {tmp_path / 'report.md'}"
    report = (tmp_path / "report.md").read_text()
    assert "commit abc" in report and f"torch               {torch.__version__}" in report
