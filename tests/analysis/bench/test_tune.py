"""The choice of launch parameters, on a CPU: with a stand-in for the stopwatch, and our kernels in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from analysis.bench.gpu import tune
from analysis.bench.gpu.contenders import draw_inputs
from analysis.bench.gpu.tune import Trial, choose, try_out
from analysis.bench.sizes import QUICK, Sizes
from analysis.bench.stopwatch import Budget, Time
from hybrid_sp.kernels.gpu import tuning
from hybrid_sp.kernels.gpu.tuning import Entry
from tests.support import interpreter
from tests.support.packages import needs

CPU = torch.device("cpu")
KEY = "fold none 8x8 float32"
FAST, SLOW, WRONG, BROKEN = (Entry(columns=512, warps=4, stages=n) for n in range(1, 5))
SECONDS = {SLOW: 1.0, FAST: 0.9, WRONG: 0.1, BROKEN: 0.1}


def now() -> Entry:
    """The entry that a launch would find."""
    return tuning.entry("fold", 8, 8, torch.float32, CPU, ("none",))


def call() -> list[Tensor]:
    """A call whose kernel is right, wrong or broken by its entry."""
    if now() == BROKEN:
        raise RuntimeError("out of resource: shared memory\nRequired: much")
    return [torch.ones(3) * (1 + 0.02 * (now() == WRONG))]


class Watch:
    """A stand-in: what a call takes is known by its entry, or changes from call to call."""

    device = CPU

    def __init__(self, seconds: Callable[[int], float] | None = None) -> None:
        self.seconds, self.calls = seconds, 0

    def time(self, run: Callable[[], Any], launching: float = 0.0) -> Time:
        run()
        self.calls += 1
        return Time(SECONDS[now()] if self.seconds is None else self.seconds(self.calls), 0.0)


def trials(*entries: Entry) -> list[Trial]:
    made = [Trial(key=KEY, decay="none", entry=entry) for entry in entries]
    tune._note_refused(made, try_out(call, KEY, entries))
    return made


def test_the_fastest_that_computes_what_the_default_does_is_chosen() -> None:
    made = trials(SLOW, WRONG, BROKEN, FAST)
    assert [one.refused for one in made] == [
        "",
        "o differs by 0.02 from the default's",
        "RuntimeError: out of resource: shared memory",
        "",
    ]
    assert choose(made, call, {}, Watch(), 3) is made[3]
    assert [len(one.values) for one in made] == [3, 0, 0, 3]


def test_the_default_stays_unless_another_is_clearly_faster() -> None:
    made = trials(FAST, SLOW)
    assert choose(made, call, {}, Watch(), 1) is made[0]
    made = trials(SLOW, FAST)
    assert choose(made, call, {}, Watch(lambda n: 1.0 if n % 2 else 0.99), 5) is made[0], "less than times vary"
    made = trials(SLOW, FAST)
    outlier = Watch(lambda n: 0.5 if n == 4 else 1.0)  # one good moment
    assert choose(made, call, {}, outlier, 5) is made[0]
    alone = trials(SLOW, BROKEN)
    assert choose(alone, call, {}, Watch(), 3) is alone[0] and not alone[0].values


def test_other_entries_are_at_their_best_meanwhile() -> None:
    seen = []

    def looks() -> list[Tensor]:
        seen.append(tuning.entry("fold", 9, 9, torch.float32, CPU, ("none",)))
        return call()

    other = {"fold none 9x9 float32": FAST}
    choose(trials(SLOW, FAST), looks, other, Watch(), 1)
    assert seen == [FAST] * 4


@needs("triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is not set to interpret")
def test_every_entry_that_calls_ask_for_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen is in a file as soon as it is; the table itself is a device's."""
    interpreter.mend()
    monkeypatch.setattr(tune, "DECAYS", ("none",))
    table = tuning.TABLE.read_text()
    shape = replace(QUICK.kernels, heads=(1,), tuned_at=20, repetitions=1)
    forms, do = draw_inputs(1, 20, 16, torch.float32, CPU)
    keys = tune.asked(tune.call_of("none", forms, do)).keys()
    assert {key.split()[0] for key in keys} == {"segments", "summary", "fold", "scan"}
    best: dict[str, Entry] = {}
    done: list[Trial] = []
    notes: list[str] = []

    class Zero(Watch):
        def time(self, run: Callable[[], Any], launching: float = 0.0) -> Time:
            return Time(1.0, 0.0)

    tune.tune_width(16, shape, torch.float32, Zero(), Budget(600.0), tmp_path, best, done, notes)
    assert best.keys() == keys and not notes and not any(one.refused for one in done)
    assert json.loads((tmp_path / "tuned.json").read_text())[tuning.INTERPRETER].keys() == keys
    assert {one.key for one in done} == set(keys) and max(len([o for o in done if o.key == k]) for k in keys) <= 5
    assert tuning.TABLE.read_text() == table
    tune.tune_width(16, shape, torch.float32, Zero(), Budget(0.0), tmp_path, {}, [], notes)
    assert len(notes) == len(keys) and notes[0].startswith("not measured, out of time: ")


def test_a_process_that_dies_refuses_the_candidates_it_has_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [[Trial(key=f"{KEY} {i}", decay="none", entry=one) for one in (SLOW, FAST, WRONG)] for i in range(3)]
    lines = [
        "import sys",
        "print('\"\"')",
        "print('\"off\"', flush=True)",
        "'float32 1' in sys.argv[-1] and sys.exit(1)",
    ]
    code = "\n".join([*lines, "print('\"\"')"])
    plain = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return plain([sys.executable, "-c", code, command[-1]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    tune._try_in_processes(made, 1, 8, 8, Budget(600.0))
    assert [[one.refused for one in group] for group in made] == [
        ["", "off", ""],
        ["", "off", "its process ended"],
        ["", "off", ""],
    ]
    tune._try_in_processes(made, 1, 8, 8, Budget(0.0))
    assert all(one.refused == "not tried, out of time" for group in made for one in group)


def test_budgets_are_cut_to_the_time_there_is() -> None:
    cut = Sizes().kernels.within(114.0)
    assert cut.tuning_seconds == 114.0 and sum(cut.seconds) == pytest.approx(114.0)
    assert cut.seconds[0] / cut.seconds[1] == pytest.approx(200 / 220)
    assert cut.heads == (16,) and cut.lengths == (8192, 32768, 131072) and Sizes().kernels.within(500).heads == (16, 32)
