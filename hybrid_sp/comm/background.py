"""A task of several messages that runs in the background, while the program computes."""

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
    """Launch a task that waits for messages and sends others, beside whatever this thread does meanwhile.

    On a CPU a thread of its own drives it. On CUDA nothing blocks a thread: the whole task, waits and all, is enqueued
    here on a stream of high priority, which begins where the current stream is now.
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
        """What the task has raised is raised by its result, as it is."""
        futures.wait([self._done])


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _enqueue(task: Callable[[], Any], what: str, header: Header, device: torch.device) -> Pending:
    """Not run yet: written for CUDA where there was none."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device, priority=-1)
    stream = _streams[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.no_grad(), ledger.background_thread():
        outcome = task()
    return Pending(lambda: outcome, _Enqueued(task, outcome, stream), what, header, device=device)


class _Enqueued:
    """Work on a side stream. It holds the task, and so the memory that the task reads, until somebody has waited."""

    def __init__(self, task: Callable[[], Any], outcome: Any, stream: torch.cuda.Stream) -> None:
        self._task: Callable[[], Any] | None = task
        self._outcome, self._stream, self._done = outcome, stream, stream.record_event()

    def wait(self) -> None:
        """The current stream waits; the outcome's memory is not given to another before that stream has read it."""
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(self._done)
        for leaf in torch.utils._pytree.tree_leaves(self._outcome):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(current)
        self._task = self._outcome = None
