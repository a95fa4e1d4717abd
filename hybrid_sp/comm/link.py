"""A link between ranks: its latency and bandwidth, and a slow one that is pretended, for measurements."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Link:
    """A network on which a message takes latency + bytes / bandwidth; seconds, and bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, messages: float, bytes_: float) -> float:
        """For messages one after the other that carry so many bytes in all."""
        return messages * self.latency + bytes_ / self.bandwidth


_pretended: Link | None = None


@contextlib.contextmanager
def slowed(link: Link) -> Iterator[None]:
    """Pretend that what this process receives comes over such a link: it arrives so much later than it does, and one
    thing after the other. For measurements where no network can be slowed down for real."""
    global _pretended
    before, _pretended = _pretended, link
    try:
        yield
    finally:
        _pretended = before


_wire = threading.Lock()


class _Slowed:
    """Work that is done when the pretended link has carried it."""

    def __init__(self, work: Any, link: Link, messages: int, received: int) -> None:
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


def carried(work: Any, messages: int, received: int) -> Any:
    """The work, or while a slow link is pretended, work that is done when that link has carried it."""
    return work if _pretended is None else _Slowed(work, _pretended, messages, received)
