"""The reporter of communication that does not arrive, for networks whose `wait` returns at once.

NCCL's `wait` only orders streams, so a lost peer raises no CommunicationError. The host stops where it next reads a
value, and after the timeout NCCL's watchdog ends the process, without the name of the operator. After half of the
timeout, this thread prints the first collective or message that the device still waits for.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .groups import Group, timeout

EVERY = 1.0  # seconds between two looks


@dataclass
class _Awaited:
    """The communication that this process waits for, since a moment of `time.monotonic`, in seconds."""

    what: str
    state: str
    since: float
    timeout: float
    done: Callable[[], bool]
    reported: bool = False


class Reporter:
    """The queue of what is waited for, and the thread that looks at it while it is not empty."""

    def __init__(self) -> None:
        self._queue: deque[_Awaited] = deque()
        self._lock = threading.Lock()
        self._looking = False

    def watch(self, what: str, state: str, timeout: float, done: Callable[[], bool]) -> None:
        """Print a line if it takes more than half of the timeout, in seconds, until `done`."""
        with self._lock:
            self._queue.append(_Awaited(what, state, time.monotonic(), timeout, done))
            if not self._looking:
                self._looking = True
                threading.Thread(target=self._run, name="reporter of communication", daemon=True).start()

    def look(self, now: float) -> str | None:
        """Drop what is done. Return a line on the first that is late and not, the first time that it is seen."""
        while self._queue and self._queue[0].done():
            self._queue.popleft()
        if not self._queue:
            return None
        first, waited = self._queue[0], now - self._queue[0].since
        if first.reported or waited < first.timeout / 2:
            return None
        first.reported = True
        return (
            f"rank {dist.get_rank() if dist.is_initialized() else 0} {first.state} for {waited:.0f} s: {first.what}; "
            f"{len(self._queue) - 1} more launched after it. After {first.timeout:.0f} s NCCL ends this process. "
            "Compare with what the other ranks print: a rank that prints nothing is behind, or gone"
        )

    def _run(self) -> None:
        while True:
            time.sleep(EVERY)
            with self._lock:
                line = self.look(time.monotonic())
                self._looking = bool(self._queue)
                if not self._looking:
                    return
            if line is not None:
                print(line, file=sys.stderr, flush=True)


_reporter = Reporter()


@contextmanager
def launching(what: str, group: Group, device: torch.device) -> Iterator[None]:
    """Report a launch that does not return: on NCCL the first message of two ranks waits for both of them."""
    if device.type != "cuda":
        yield
        return
    launched = threading.Event()
    _reporter.watch(what, "has tried to launch", timeout(group).total_seconds(), launched.is_set)
    try:
        yield
    finally:
        launched.set()


def waiting(what: str, group: Group, device: torch.device) -> None:
    """Report communication that the current stream waits for from here on, if it does not arrive."""
    if device.type == "cuda":
        arrived = torch.cuda.current_stream(device).record_event()
        _reporter.watch(what, "has waited", timeout(group).total_seconds(), arrived.query)
