"""The stopwatch of the benchmark of kernels: its arithmetic on CUDA, with a pretended device, and its budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from analysis.bench.device import ceilings
from analysis.bench.stopwatch import AHEAD, LONGEST_PAUSE, Budget, Stopwatch

RATE = 2e9  # cycles a second of the pretended device


class Pretended:
    """A device on which a pause takes its cycles and all else a millisecond, and the host two to launch it; it notes
    the pauses."""

    def __init__(self) -> None:
        self.now = self.host = 0.0
        self.pauses: list[float] = []
        self.Event = lambda enable_timing: _Event(self)

    def sleep(self, cycles: int) -> None:
        self.pauses.append(cycles / RATE)
        self.now += cycles / RATE

    def work(self) -> None:
        self.now += 1e-3
        self.host += 2e-3


class _Event:
    def __init__(self, device: Pretended) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _Event) -> float:
        return (later.at - self.at) * 1e3


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    device = Pretended()
    monkeypatch.setattr("analysis.bench.stopwatch.time", SimpleNamespace(perf_counter=lambda: device.host))
    monkeypatch.setattr(torch.cuda, "Event", device.Event)
    monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)
    for name, value in (("memory_allocated", 100), ("max_memory_allocated", 350)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    return device


def on(device: Pretended) -> Stopwatch:
    watch = Stopwatch(torch.device("cpu"))
    cuda: Any = SimpleNamespace(type="cuda")
    watch.device, watch._flushed = cuda, torch.ones(4)
    watch._cycles_per_second = watch._calibrate()
    device.pauses.clear()
    return watch


def test_the_time_is_that_between_the_events_and_the_pause_is_not_in_it(pretended: Pretended) -> None:
    watch = on(pretended)
    assert watch._cycles_per_second == pytest.approx(RATE)
    took = watch.time(pretended.work, launching=0.002)
    assert took == (pytest.approx(1e-3), pytest.approx(2e-3))
    assert pretended.pauses == [pytest.approx(AHEAD * 0.002 + 1e-4)]
    assert not watch._flushed.any()
    watch.pause(10.0)
    assert pretended.pauses[-1] == pytest.approx(LONGEST_PAUSE)
    assert watch.median(pretended.work, 3) == pytest.approx(1e-3)
    assert watch.peak_bytes(pretended.work) == 250


def test_a_cpu_has_ceilings_and_a_peak_of_memory() -> None:
    watch = Stopwatch(torch.device("cpu"))
    limits = ceilings(watch, torch.float32, copied=2**16, side=32, repetitions=2)
    assert limits.copy > 0 and limits.matmul > 0
    assert watch.peak_bytes(lambda: torch.ones(1000) + 1) >= 4000


def test_a_budget_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("analysis.bench.stopwatch.time", SimpleNamespace(monotonic=lambda: now))
    budget = Budget(60.0)
    now = 150.0
    assert Budget(0.0).over and not budget.over and budget.left == 10.0
    now = 161.0
    assert budget.over and budget.left == 0.0
