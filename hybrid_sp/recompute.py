"""The record by which a checkpointed forward is recomputed without communication."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor


class _Recording(threading.local):
    """The results that the checkpointed forward received, and the position of its recomputation among them."""

    tape: list[Any] | None = None
    position: int | None = None  # None while recording


_recording = _Recording()


def is_replaying() -> bool:
    """Tell whether a checkpointed forward is being recomputed from its record."""
    return _recording.tape is not None and _recording.position is not None


def recorded(receive: Callable[[], tuple[Tensor | None, ...]]) -> tuple[Any, ...]:
    """Return `receive()`; inside a checkpoint keep its result, and return it again when the forward is recomputed."""
    if _recording.tape is None:
        return receive()
    if _recording.position is not None:
        result = _recording.tape[_recording.position]
        _recording.position += 1
    else:
        result = receive()
        _recording.tape.append(result)
    return tuple(None if x is None else x.detach() for x in result)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the `context_fn` for torch.utils.checkpoint (use_reentrant=False): recomputing communicates nothing.

    The forward records entering states, halos and gathered keys; with keep_kv=False it records the output instead of
    the keys. The recomputation reads them by index, and does not ask the other ranks again. This is LASP's state
    caching (arXiv 2404.02882). Three checkpointed linear layers make 6 collectives instead of 9, with the same
    gradients. Reentrant checkpoints, checkpoints without this, and the baselines are correct and communicate again.
    """
    tape: list[Any] = []
    return _Context(tape, None), _Context(tape, 0)


class _Context:
    """The context of a recorded forward, or of its recomputation, which reads the tape from `position`.

    A retained graph may enter its recomputation more than once.
    """

    def __init__(self, tape: list[Any], position: int | None) -> None:
        self._inner = tape, position
        self._outer: list[tuple[list[Any] | None, int | None]] = []

    def __enter__(self) -> None:
        self._outer.append((_recording.tape, _recording.position))
        _recording.tape, _recording.position = self._inner

    def __exit__(self, *error: object) -> None:
        _recording.tape, _recording.position = self._outer.pop()
