"""The stages of a run: each is a process with a limit of time, and the report is written again after each of them.

    passed     it ended by itself, with exit code 0
    failed     it ended with another code
    skipped    it ended with code 77: this machine lacks what its last line names
    too late   it had not ended at its limit, and was killed
    cut        the whole run was told to end meanwhile
    running    the whole run was killed meanwhile
    waiting    the run ended before its turn

A stage runs in a session of its own, so that all of its processes end with it. Its output goes to NAME/log.txt. Stages
write what they find into the folder NAME too; the report takes in every report.md there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from analysis.tables import Table, as_markdown

ROOT = Path(__file__).parents[2]
LACKING = 77  # the exit code of a program that says what it needs and does not find here
GRACE = 5.0  # seconds between asking a stage to end and killing it
SHOWN = 60  # last lines of the log of a stage that did not pass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The command of a stage, in which the words {seconds} and {folder} stand for what is known when it starts.

    share  the stage's part of the time, relative to the stages after it
    until  the stage that ends this one if it has not ended; the stages before that run beside it
    """

    name: str
    about: str
    command: Sequence[str]
    share: float
    environment: Mapping[str, str] = field(default_factory=dict)
    until: str = ""


class Running(NamedTuple):
    """The process of a stage, and when it began."""

    stage: Stage
    process: subprocess.Popen[bytes]
    begin: float


@dataclass(kw_only=True)
class Outcome:
    """The record of a stage: one of the words above, its seconds, its limit, and the last line that it printed."""

    about: str
    command: str = ""
    commit: str | None = None
    outcome: str = "waiting"
    seconds: float = 0.0
    limit: float = 0.0
    last: str = ""


class Run:
    """The stages of one folder. Another run in the same folder replaces the stages that it runs, and keeps others."""

    def __init__(self, stages: Sequence[Stage], folder: Path, seconds: float, facts: Mapping[str, Any]) -> None:
        self.stages, self.folder, self.facts = stages, folder, facts
        self._ends = time.monotonic() + seconds
        self.outcomes: dict[str, Outcome] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "results.json").exists():
            before = json.loads((folder / "results.json").read_text())["stages"]
            self.outcomes = {name: Outcome(**one) for name, one in before.items()}
        self.outcomes |= {stage.name: Outcome(about=stage.about, commit=facts.get("commit")) for stage in stages}

    def run(self) -> bool:
        """Run all stages, and return True if every one of them passed."""
        beside: list[Running] = []
        try:
            for i, stage in enumerate(self.stages):
                for other in [one for one in beside if one.stage.until == stage.name]:
                    beside.remove(other)
                    self._finish(other, 0.0)
                left = self._ends - time.monotonic()
                if left <= 0:
                    break
                later = sum(one.share for one in self.stages[i:])
                running = self._start(stage, left if stage.until else left * stage.share / later)
                if stage.until:
                    beside.append(running)
                else:
                    self._finish(running, self.outcomes[stage.name].limit)
            while beside:
                self._finish(beside[-1], max(0.0, self._ends - time.monotonic()))
                beside.pop()
        finally:  # whatever has ended this run, such as SystemExit by a signal
            for one in beside:
                self._end(one, "cut")
        self.write()
        return all(self.outcomes[stage.name].outcome == "passed" for stage in self.stages)

    def _start(self, stage: Stage, limit: float) -> Running:
        place = self.folder / stage.name
        place.mkdir(exist_ok=True)
        known = {"{seconds}": f"{0.9 * limit:.0f}", "{folder}": str(place)}
        command = [known.get(word, word) for word in stage.command]
        record = self.outcomes[stage.name]
        record.command, record.limit, record.outcome = " ".join(command), limit, "running"
        self.write()
        with (place / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | stage.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return Running(stage, process, time.monotonic())

    def _finish(self, running: Running, limit: float) -> None:
        """Wait for a stage until its limit, and write down what became of it."""
        outcome = "cut"
        try:
            code = running.process.wait(limit)
            outcome = {0: "passed", LACKING: "skipped"}.get(code, f"failed ({code})")
        except subprocess.TimeoutExpired:
            outcome = "too late"
        finally:
            self._end(running, outcome)

    def _end(self, running: Running, outcome: str) -> None:
        """End all processes of the stage, first by asking, then by killing, and write the report."""
        process, record = running.process, self.outcomes[running.stage.name]
        if process.poll() is None:
            _signal(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        _signal(process.pid, signal.SIGKILL)  # the session's other processes, even if the first has ended
        process.wait()
        record.outcome, record.seconds = outcome, time.monotonic() - running.begin
        record.last = last_line(self.folder / running.stage.name / "log.txt")
        self.write()
        print(f"{running.stage.name:<14}{outcome:<12}{record.seconds:6.1f} s  {record.last[:90]}", flush=True)

    def write(self) -> None:
        """Write report.md and results.json, each at once or not at all."""
        values = {**self.facts, "stages": {name: asdict(one) for name, one in self.outcomes.items()}}
        _replace(self.folder / "results.json", json.dumps(values, indent=1) + "\n")
        _replace(self.folder / "report.md", self._report())

    def _report(self) -> str:
        rows = tuple(
            (name, one.about, one.outcome, f"{one.seconds:.0f}", f"{one.limit:.0f}", one.last[:120].replace("|", "/"))
            for name, one in self.outcomes.items()
        )
        header = ("stage", "what it does", "outcome", "seconds", "limit", "last line")
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items() if value)
        sections = [
            "# The first run on a device",
            facts,
            as_markdown(Table(header=header, rows=rows, numbers=frozenset({"seconds", "limit"}))),
        ]
        for name, one in self.outcomes.items():
            reports = [path.read_text().strip() for path in sorted((self.folder / name).rglob("report.md"))]
            if one.outcome not in ("passed", "waiting"):
                log = self.folder / name / "log.txt"
                lines = log.read_text(errors="replace").splitlines()[-SHOWN:] if log.exists() else []
                reports.append("\n".join(["The end of its log:", "", "```", *lines, "```"]))
            if reports:
                sections += [f"# {name}: {one.outcome}", *reports]
        return "\n\n".join(sections) + "\n"


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def end_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into SystemExit, as Ctrl-C is an exception already."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    os.replace(beside, path)
