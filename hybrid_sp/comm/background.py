"""The tasks in the background: several messages each, sent and received while the program computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import torch

from . import ledger
from .pending import Header, Pending


def run_in_background(
    task: Callable[[], Any], what: str, header: Header, device: torch.device | None = None
) -> Pending:
    """Launch a task that waits for messages and sends others, while this thread goes on.

    On a CPU a separate thread runs the task. On CUDA the task blocks no thread: whoever waits enqueues all of it, waits
    included, on a stream of high priority. That stream starts from the point of the current stream at this call. The
    computation that the caller launches meanwhile is therefore queued before the long exchange.
    """
    if device is not None and device.type == "cuda":
        work = _Enqueued(task, device)
        return Pending(lambda: work.outcome, work, what, header, device=device)
    done: Future[Any] = Future()

    def run() -> None:
        try:
            with torch.no_grad(), ledger.background_thread():
                done.set_result(task())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=what, daemon=True).start()
    return Pending(done.result, _Joined(done), what, header)


class _Joined:
    def __init__(self, done: Future[Any]) -> None:
        self._done = done

    def wait(self) -> None:
        """Wait for the task's end. If the task raised, reading its result raises the same exception."""
        futures.wait([self._done])


_streams: dict[torch.device, torch.cuda.Stream] = {}


class _Enqueued:
    """The task on a side stream. This has not run yet: it was written for CUDA on a machine without it."""

    outcome: Any = None

    def __init__(self, task: Callable[[], Any], device: torch.device) -> None:
        self._task, self._device = task, device
        self._begin = torch.cuda.current_stream(device).record_event()

    def wait(self) -> None:
        """Enqueue the task, and make the current stream wait for it."""
        if self._device not in _streams:
            _streams[self._device] = torch.cuda.Stream(self._device, priority=-1)
        stream, current = _streams[self._device], torch.cuda.current_stream(self._device)
        stream.wait_event(self._begin)
        with torch.cuda.stream(stream), torch.no_grad(), ledger.background_thread():
            self.outcome = self._task()
        current.wait_event(stream.record_event())
