"""What CUDA and NCCL are asked for, seen by stand-ins, since the tests run where there is neither."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from hybrid_sp import mesh
from hybrid_sp.comm import background, groups, link
from hybrid_sp.comm.pending import Header, Pending

DEVICE = torch.device("cuda", 0)


class Stream:
    """Says what it is asked for."""

    log: list[str] = []

    def __init__(self, device: torch.device, name: str = "side", priority: int = 0) -> None:
        self.device, self.name = device, name
        self.log.append(f"{name} has priority {priority}")

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


class Read(torch.Tensor):
    """A tensor whose memory the allocator keeps for the streams that read it."""

    def record_stream(self, stream: Any) -> None:
        stream.log.append(f"kept for {stream.name}")


def test_a_task_aside_is_enqueued_after_the_computation_and_begins_before_it(cuda: list[str]) -> None:
    x = torch.zeros(2).as_subclass(Read)

    def task() -> Outcome:
        cuda.append(f"task on {torch.cuda.current_stream(DEVICE).name}, grad {torch.is_grad_enabled()}")
        return Outcome([x], None)

    pending = background.run_in_background(task, "a pipeline", Header(tag="linear"), DEVICE)
    cuda.append("computation")
    assert pending.wait().states[0] is x
    assert cuda == [
        "event on main",
        "computation",
        "side has priority -1",
        "side waits for the event of main",
        "task on side, grad False",
        "event on side",
        "main waits for the event of side",
        "kept for main",
    ]
    background.run_in_background(task, "a pipeline", Header(tag="linear"), DEVICE).drain()
    assert cuda.count("side has priority -1") == 1, "one stream serves all"


def test_memory_asked_for_on_one_stream_is_kept_for_the_stream_that_reads_it(cuda: list[str]) -> None:
    """A message is asked for on the main stream, and read by the task on the side stream."""
    out = torch.zeros(1).as_subclass(Read)
    message = Pending(lambda: [out], None, "a message", device=DEVICE)
    background.run_in_background(message.wait, "a ring", Header(tag="linear"), DEVICE).wait()
    assert [line for line in cuda if line.startswith("kept")] == ["kept for side", "kept for main"]
    Pending(lambda: out, None, "a message", device=torch.device("cpu")).wait()
    assert cuda[-1] == "kept for main"


def test_groups_of_nccl_have_streams_of_high_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def options(**given: Any) -> Any:
        made.append(SimpleNamespace(**given, config=SimpleNamespace(max_ctas=None)))
        return made[-1]

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=options), raising=False)
    minute = timedelta(minutes=1)
    assert groups.group_options("cpu:gloo", minute) is None
    one, other = (groups.group_options("cpu:gloo,cuda:nccl", minute) for _ in range(2))
    assert one is not other and one.is_high_priority_stream and one._timeout == minute and one.config.max_ctas is None
    assert groups.group_options("nccl", minute, ctas=4).config.max_ctas == 4


@pytest.mark.parametrize(
    ("local", "seen", "world", "gpu"),
    [("3", 8, 8, 3), ("5", 1, 8, 0), (None, 1, 8, 0), (None, 8, 1, 0), ("1", 8, 1, 1)],
)
def test_a_process_takes_the_gpu_that_is_its_own(
    monkeypatch: pytest.MonkeyPatch, local: str | None, seen: int, world: int, gpu: int
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert mesh._gpu(world) == gpu


@pytest.mark.parametrize(
    ("local", "said"), [("", "LOCAL_RANK is not set"), ("8", "LOCAL_RANK=8, but torch sees 8 GPUs")]
)
def test_a_process_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, local: str, said: str) -> None:
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ValueError, match=said):
        mesh._gpu(16)


def test_the_gpu_is_chosen_before_the_groups_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that makes groups first would open GPU 0 as well."""
    log: list[str] = []

    def stop(*_: Any, **__: Any) -> None:
        log.append("groups")
        raise KeyError

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: log.append(f"GPU {device}"))
    monkeypatch.setattr(groups, "group_options", stop)
    with pytest.raises(KeyError):
        mesh.init_mesh(device="cuda")
    assert log == ["GPU 1", "groups"]


def test_options_of_nccl_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def started(*_: Any, **options: Any) -> None:
        asked.update(options)

    def subgroups(ranks: Any, *, pg_options: Any, group_desc: str, **_: Any) -> Any:
        asked[group_desc] = pg_options
        return None, None

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(groups, "group_options", lambda backend, timeout, ctas=None: ctas)
    monkeypatch.setattr(dist, "init_process_group", started)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", subgroups)
    monkeypatch.setattr(mesh.DeviceMesh, "from_group", lambda *_, **__: None)
    mesh.init_mesh(device="cuda", eager=True, gather_ctas=4)
    assert (asked["device_id"], asked["sp"], asked["dp"]) == (DEVICE, 4, None)
    asked.clear()
    mesh.init_mesh(device="cuda")
    assert "device_id" not in asked and asked["sp"] is None


@pytest.mark.parametrize("options", [{"eager": True}, {"gather_ctas": 2}, {"device": "cuda", "gather_ctas": 0}])
def test_options_that_nccl_cannot_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^init_mesh: .*(device must be cuda, got cpu|at least 1, got 0)"):
        mesh.init_mesh(**options)


def test_a_slow_link_cannot_be_pretended_on_cuda() -> None:
    work: Any = SimpleNamespace(wait=lambda: None)
    with link.slowed(link.Link(latency=0.0, bandwidth=1e9)):
        with pytest.raises(ValueError, match="slow link can be pretended on the CPU alone"):
            link.carried(work, 1, 8, DEVICE)
        link.carried(work, 1, 8, torch.device("cpu")).wait()
    assert link.carried(work, 1, 8, DEVICE) is work
