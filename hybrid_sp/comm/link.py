"""The link between ranks: its latency and bandwidth, and a pretended slow one for measurements."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from .pending import Work


@dataclass(frozen=True, kw_only=True)
class Link:
    """The network between ranks: a message takes latency + bytes / bandwidth, in seconds and bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, messages: float, bytes_: float) -> float:
        """Return the time of `messages` messages, sent one after the other, that carry `bytes_` bytes in total."""
        return messages * self.latency + bytes_ / self.bandwidth


_pretended: Link | None = None


@contextlib.contextmanager
def slowed(link: Link) -> Iterator[None]:
    """Pretend that this process receives everything over such a link, for measurements without a real slow network.

    Everything arrives later by the time of the link, one message after the other.
    """
    global _pretended
    before, _pretended = _pretended, link
    try:
        yield
    finally:
        _pretended = before


_wire = threading.Lock()


class _Slowed:
    """The work that is done when the pretended link has carried it."""

    def __init__(self, work: Work, link: Link, messages: int, received: int) -> None:
        self._done: Future[None] = Future()

        def carry() -> None:
            try:
                work.wait()
                with _wire:
                    time.sleep(received / link.bandwidth)
                time.sleep(messages * link.latency)
                self._done.set_result(None)
            except BaseException as error:
                self._done.set_exception(error)

        threading.Thread(target=carry, daemon=True).start()

    def wait(self) -> None:
        self._done.result()


def carried(work: Work, messages: int, received: int, device: torch.device) -> Work:
    """Return the work; while a slow link is pretended, return work that is done when that link has carried it.

    Raises ValueError on CUDA: the thread that carries would make the stream of the computation wait.
    """
    if _pretended is None:
        return work
    if device.type == "cuda":
        raise ValueError("slowed: a slow link can be pretended on the CPU alone, not for tensors on CUDA")
    return _Slowed(work, _pretended, messages, received)
