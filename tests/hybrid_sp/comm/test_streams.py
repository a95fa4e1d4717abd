"""What CUDA and NCCL are asked for, seen by stand-ins, since the tests run where there is neither."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from hybrid_sp.comm import background, groups
from hybrid_sp.comm.pending import Header

DEVICE = torch.device("cuda", 0)


class Stream:
    """Says what it is asked for."""

    log: list[str] = []

    def __init__(self, device: torch.device, name: str = "side", priority: int = 0) -> None:
        self.device, self.name = device, name
        self.log.append(f"{name} has priority {priority}")

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.log.append(f"event on {self.name}")
        return f"the event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


class Outcome(NamedTuple):
    states: list[torch.Tensor]
    nothing: None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The log of stand-ins for CUDA's streams."""
    Stream.log = []
    current = [Stream(DEVICE, "main")]

    @contextmanager
    def entered(stream: Stream) -> Any:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(background, "_streams", {})
    Stream.log.clear()
    return Stream.log


def test_a_task_aside_is_enqueued_on_a_stream_of_high_priority(cuda: list[str]) -> None:
    x = torch.zeros(2)

    def task() -> Outcome:
        cuda.append(f"task on {torch.cuda.current_stream(DEVICE).name}, grad {torch.is_grad_enabled()}")
        return Outcome([x], None)

    pending = background.run_in_background(task, "a pipeline", Header(tag="linear"), DEVICE)
    launched = ["side has priority -1", "side waits for main", "task on side, grad False", "event on side"]
    assert cuda == launched
    assert pending.wait().states == [x] and cuda == [*launched, "main waits for the event of side"]
    again = background.run_in_background(task, "a pipeline", Header(tag="linear"), DEVICE)
    again.drain()
    assert cuda.count("side has priority -1") == 1, "one stream serves all"


def test_memory_that_a_task_reads_lives_until_somebody_has_waited(cuda: list[str]) -> None:
    work = background._Enqueued(lambda: None, [torch.zeros(1)], Stream(DEVICE))
    assert work._task is not None
    work.wait()
    assert work._task is None and work._outcome is None


def test_groups_of_nccl_have_streams_of_high_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def options(**given: Any) -> Any:
        made.append(SimpleNamespace(**given))
        return made[-1]

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=options), raising=False)
    minute = timedelta(minutes=1)
    assert groups.group_options("cpu:gloo", minute) is None
    one, other = (groups.group_options("cpu:gloo,cuda:nccl", minute) for _ in range(2))
    assert one is not other and one.is_high_priority_stream and one._timeout == minute
