"""Where a wait returns at once, what never arrives is named while it is waited for."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_sp.comm import reporter
from hybrid_sp.comm.pending import Header, Pending
from hybrid_sp.comm.reporter import Reporter
from tests.hybrid_sp.comm.test_streams import DEVICE

WAITED = "has waited"


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> Reporter:
    """A reporter that looks only when asked to, by a clock that stands at 100 s."""
    monkeypatch.setattr(reporter, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(reporter.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    return Reporter()


def test_the_first_that_does_not_arrive_is_named_once_after_half_of_the_timeout(still: Reporter) -> None:
    arrived = {"a": False, "b": False, "c": False}
    for what in arrived:
        still.watch(what, WAITED, 60.0, lambda what=what: arrived[what])  # type: ignore[misc]
    assert still.look(129.0) is None
    arrived["a"] = True
    line = still.look(130.0)
    assert line is not None
    assert line.startswith("rank 0 has waited for 30 s: b; 1 more launched after it. After 60 s NCCL ends")
    assert still.look(140.0) is None, "once"
    arrived["b"] = True
    assert "has waited for 45 s: c; 0 more" in (still.look(145.0) or "")
    arrived["c"] = True
    assert still.look(200.0) is None and not still._queue


def test_the_thread_prints_the_line_and_ends_when_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reporter, "EVERY", 0.001)
    watched, printed, done = Reporter(), threading.Event(), threading.Event()
    monkeypatch.setattr(reporter, "print", lambda line, **to: (print(line, **to), printed.set()), raising=False)
    for _ in range(2):  # a new thread begins where one has ended
        watched.watch("all_gather linear forward call 2 [2x3] torch.float32 grad", WAITED, 0.0, done.is_set)
        (thread,) = (t for t in threading.enumerate() if t.name == "reporter of communication")
        assert printed.wait(60)
        done.set()
        thread.join(60)
        assert not thread.is_alive()
        done.clear()
        printed.clear()
    assert capsys.readouterr().err.count("all_gather linear forward call 2 [2x3] torch.float32 grad; 0 more") == 2


def test_a_wait_on_cuda_is_watched_until_its_event_has_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = threading.Event()
    stream = SimpleNamespace(record_event=lambda: SimpleNamespace(query=happened.is_set))
    watched: list[Any] = []
    group: Any = object()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(reporter, "timeout", lambda group: SimpleNamespace(total_seconds=lambda: 60.0))
    monkeypatch.setattr(reporter._reporter, "watch", lambda *given: watched.append(given))
    work: Any = SimpleNamespace(wait=lambda: None)
    what = Header(tag="linear", call=3).text("message 2 from rank 1:", torch.zeros(4))
    assert Pending(lambda: 7, work, what, device=DEVICE, group=group).wait() == 7
    ((said, state, limit, done),) = watched
    assert said == "message 2 from rank 1: linear forward call 3 [4] torch.float32"
    assert (state, limit, done()) == (WAITED, 60.0, False)
    happened.set()
    assert done()
    with pytest.raises(KeyError), reporter.launching(what, group, DEVICE):  # such as the first message of two ranks
        assert watched[1][1] == "has tried to launch" and not watched[1][3]()
        raise KeyError
    assert watched[1][3]()
    Pending(lambda: 7, work, what, device=torch.device("cpu"), group=group).wait()
    with reporter.launching(what, group, torch.device("cpu")):
        assert len(watched) == 2, "gloo's waits raise by themselves"
