"""The tasks in the background: several messages each, sent and received while the program computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from . import ledger
from .pending import Header, Pending


def run_in_background(
    task: Callable[[], Any], what: str, header: Header, device: torch.device | None = None
) -> Pending:
    """Launch a task that waits for messages and sends others, while this thread goes on.

    On a CPU a separate thread runs the task. On CUDA the task blocks no thread: all of it, waits included, is enqueued
    here on a stream of high priority. That stream starts from the present point of the current stream.
    """
    if device is not None and device.type == "cuda":
        return _enqueue(task, what, header, device)
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


def _enqueue(task: Callable[[], Any], what: str, header: Header, device: torch.device) -> Pending:
    """Enqueue the task on a side stream. This has not run yet: it was written for CUDA on a machine without it."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device, priority=-1)
    stream = _streams[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.no_grad(), ledger.background_thread():
        outcome = task()
    return Pending(lambda: outcome, _Enqueued(task, outcome, stream), what, header, device=device)


class _Enqueued:
    """The work on a side stream. It holds the task, and so the memory that the task reads, until somebody waits."""

    def __init__(self, task: Callable[[], Any], outcome: Any, stream: torch.cuda.Stream) -> None:
        self._task: Callable[[], Any] | None = task
        self._outcome, self._stream, self._done = outcome, stream, stream.record_event()

    def wait(self) -> None:
        """Make the current stream wait, and keep the outcome's memory from reuse until that stream has read it."""
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(self._done)
        for leaf in torch.utils._pytree.tree_leaves(self._outcome):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(current)
        self._task = self._outcome = None
