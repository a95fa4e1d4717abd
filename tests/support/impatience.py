"""Timeouts that a test wants to see happen: of a moment, for what can never come, so that no rank is ever too slow."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

MOMENT = timedelta(milliseconds=50)


def timeout_of(group: Any) -> timedelta:
    """How long a gloo group waits."""
    return group._get_backend(torch.device("cpu")).options._timeout


class Impatience:
    """Waits for a moment. The first one of each rank begins when every rank has come to its first, or to `meet`: then
    all is launched that will be, and what has not come never does."""

    def __init__(self) -> None:
        self.met = False

    def meet(self) -> None:
        if not self.met:
            self.met = True
            dist.barrier()

    def of(self, work: Any) -> Any:
        """The work of a message, waited for for a moment."""

        def wait() -> None:
            self.meet()
            work.wait(MOMENT)

        return SimpleNamespace(wait=wait)

    def of_messages(self, patch: pytest.MonkeyPatch) -> None:
        """Every message that this rank launches from here on."""

        def launching(launch: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self.of(launch(*args, **kwargs))

        for name in ("isend", "irecv"):
            patch.setattr(dist, name, launching(getattr(dist, name)))

    def of_batches(self, patch: pytest.MonkeyPatch) -> None:
        """Every batch of messages that this rank launches from here on."""
        batch = dist.batch_isend_irecv
        patch.setattr(dist, "batch_isend_irecv", lambda operations: [self.of(work) for work in batch(operations)])
