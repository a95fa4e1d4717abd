"""The communication in flight: its purpose, its result, and its failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import ledger, reporter
from .groups import Group
from .ledger import Row, Wait


@dataclass(frozen=True, kw_only=True)
class Header:
    """The purpose of a collective: `tag` is the kind of layer, `call` this shard's operator call, counted from 0."""

    tag: str
    direction: str = "forward"
    call: int = 0
    check: bool = False
    note: str = ""
    exchange: int = 0  # numbers the group's exchanges by messages, so that messages of two never meet

    def text(self, collective: str, x: Tensor) -> str:
        shape = "x".join(map(str, x.shape))
        return f"{collective} {self.tag} {self.direction} call {self.call} [{shape}] {x.dtype} {self.note}".strip()


class CommunicationError(RuntimeError):
    """The failure of a collective or a message, by error or timeout; the message names the rank, layer and call."""


class Work(Protocol):
    """The work of a launch that somebody else carries out."""

    def wait(self) -> object:
        """Return when it is done."""


class Pending:
    """The handle of communication in flight. `wait` returns its result, once; a second wait raises RuntimeError."""

    def __init__(
        self,
        result: Callable[[], Any],
        work: Work | None = None,
        what: str = "",
        header: Header | None = None,
        row: Row | None = None,
        device: torch.device | None = None,
        group: Group = None,
    ) -> None:
        self._result: Callable[[], Any] | None = result
        self._work, self._what, self._header, self._row = work, what, header, row
        self._device, self._group = device, group

    def wait(self) -> Any:
        if self._result is None:
            raise RuntimeError(f"waited twice for: {self._what}")
        result, self._result = self._result, None
        if self._work is not None:
            begin = ledger.moment(self._device)
            try:
                self._work.wait()
            except CommunicationError:
                raise
            except RuntimeError as error:
                raise CommunicationError(f"rank {dist.get_rank()} failed in: {self._what}: {error}") from error
            self._arrived(begin)
            if self._group is not None and self._device is not None:
                reporter.waiting(self._what, self._group, self._device)
        return self._read_here(result())

    def then(self, step: Callable[[Any], Any]) -> Pending:
        """Return a pending that applies `step` to this one's result when it is waited for."""
        return Pending(lambda: step(self.wait()), what=self._what)

    def drain(self) -> None:
        """Wait and discard, if nobody has waited."""
        if self._result is not None:
            self.wait()

    def _read_here(self, result: Any) -> Any:
        """Return the result; on CUDA keep its memory from reuse until the current stream has read it.

        It may come from another stream's memory: a task in the background makes its results on a side stream, and
        messages are asked for on one stream and read on another.
        """
        if self._device is not None and self._device.type == "cuda":
            current = torch.cuda.current_stream(self._device)
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    leaf.record_stream(current)
        return result

    def _arrived(self, begin: float) -> None:
        end, header = ledger.moment(self._device), self._header
        if self._row is not None:
            self._row.arrived = end
        if header is not None:
            wait = Wait(
                what=self._what, tag=header.tag, direction=header.direction, call=header.call, begin=begin, end=end
            )
            ledger.note_wait(wait)


def note_row(collective: str, header: Header, received: int, device: torch.device) -> Row:
    """Count a launch on the open ledgers."""
    row = Row(
        collective=collective,
        tag=header.tag,
        direction=header.direction,
        call=header.call,
        bytes=received,
        launched=ledger.moment(device),
    )
    ledger.note_row(row)
    return row
