"""Start/finish pairs: communication that is overlapped with computation, written once forward and mirrored by autograd.

An operator calls `start`, computes what needs no other rank, and calls `finish`. The two are autograd nodes joined by a
token, an empty tensor:

    forward     start launches | local work | finish waits
    backward    finish launches | gradient of the local work | start waits

because autograd runs nodes in the reverse of the order in which they were made. `Call` is what the nodes of one
operator call share; an `Exchange` says what is sent and what is done with what arrives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable

from .collectives import Header, Pending
from .layout import Shard


class Exchange(Protocol):
    """What `start` and `finish` do with the summaries of one call of an operator.

    `launch` sends them; `arrive` makes of what is received the entering states, the final state, and the transitions
    that backward needs beside the entering states. `launch_backward` sends the gradients of the first two, and
    `arrive_backward` makes of what is received the gradients of what `launch` sent.
    """

    def launch(self, header: Header, state: Tensor, transition: Tensor | None) -> Pending: ...

    def arrive(self, received: Any, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def launch_backward(self, header: Header, d_entering: Tensor, d_final: Tensor) -> Pending: ...

    def arrive_backward(
        self, received: Any, entering: Tensor, transitions: Tensor | None
    ) -> tuple[Tensor, Tensor | None]: ...

    def initial_backward(self, transitions: Tensor | None, d_entering: Tensor, d_final: Tensor) -> Tensor: ...


class Call:
    """One operator call: its collectives in flight, one per direction and pass, and what they are called.

    As a context manager around start ... finish it drains the forward collective if an exception falls between, so
    that the other ranks are not left waiting.
    """

    def __init__(self, shard: Shard, tag: str) -> None:
        self.shard, self.sp, self.tag, self.number = shard, shard.sp, tag, next(shard.calls)
        self._forward: Pending | None = None
        self._backward: Pending | None = None

    def header(self, direction: str, note: str = "") -> Header:
        note = f"{note} {self.shard.sequence}".strip()
        return Header(tag=self.tag, direction=direction, call=self.number, check=self.sp.check, note=note)

    def launch_forward(self, launch: Callable[[], Pending]) -> None:
        """Launch; not in the recomputation of a checkpoint that has recorded the result."""
        if not _replaying():
            self._forward = self._in_flight(launch())

    def forward_result(self) -> Any:
        pending, self._forward = self._forward, None
        assert pending is not None, "finish without start"
        return pending.wait()

    def launch_backward(self, launch: Callable[[], Pending]) -> None:
        """Launch the gradients' collective. `backward_result` waits for it; or, where autograd needs no gradient
        beyond this point and never gets there, the end of the backward pass."""
        self._backward = self._in_flight(launch())
        Variable._execution_engine.queue_callback(self._drain_backward)

    def backward_result(self) -> Any:
        pending, self._backward = self._backward, None
        assert pending is not None, "backward of start without backward of finish"
        return pending.wait()

    def _in_flight(self, pending: Pending) -> Pending:
        if self.sp.overlap:
            return pending
        result = pending.wait()
        return Pending(lambda: result)

    def _drain_backward(self) -> None:
        if self._backward is not None:
            self.backward_result()

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._forward is not None:
            self._forward.drain()


def start(call: Call, exchange: Exchange, state: Tensor, transition: Tensor | None) -> Tensor:
    """Launch the exchange of this rank's summaries. Returns the token for `finish`."""
    return _Start.apply(call, exchange, state, transition)


def finish(call: Call, exchange: Exchange, token: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """Wait, and return the states that enter this rank's spans and the final state."""
    return _Finish.apply(call, exchange, token, initial)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, exchange: Exchange, state: Tensor, transition: Tensor | None) -> Tensor:
        ctx.call, ctx.exchange = call, exchange
        note = "grad" if any(ctx.needs_input_grad) else "no grad"
        call.launch_forward(lambda: exchange.launch(call.header("forward", note), state, transition))
        return state.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor) -> tuple[None, None, Tensor, Tensor | None]:
        d_state, d_transition = ctx.exchange.arrive_backward(*ctx.call.backward_result())
        return None, None, d_state, d_transition if ctx.needs_input_grad[3] else None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, exchange: Exchange, token: Tensor, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.exchange = call, exchange
        entering, final, transitions = recorded(lambda: exchange.arrive(call.forward_result(), initial))
        ctx.save_for_backward(entering, transitions)
        return entering, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_entering: Tensor, d_final: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        entering, transitions = ctx.saved_tensors
        d_token = d_initial = None
        if ctx.needs_input_grad[2]:
            header = ctx.call.header("backward")
            ctx.call.launch_backward(
                lambda: ctx.exchange.launch_backward(header, d_entering, d_final).then(
                    lambda received: (received, entering, transitions)
                )
            )
            d_token = d_entering.new_empty(0)
        if ctx.needs_input_grad[3]:
            d_initial = ctx.exchange.initial_backward(transitions, d_entering, d_final)
        return None, None, d_token, d_initial


class _Recording(threading.local):
    """What finish nodes received in the checkpointed forward, and how far its recomputation has come."""

    tape: list[Any] | None = None
    position: int | None = None  # None while recording


_recording = _Recording()


def _replaying() -> bool:
    return _recording.tape is not None and _recording.position is not None


def recorded(receive: Callable[[], tuple[Tensor | None, ...]]) -> tuple[Any, ...]:
    """`receive()`; inside a checkpoint its result is kept, and given again when the forward is recomputed."""
    if _recording.tape is None:
        return receive()
    if _recording.position is not None:
        result = _recording.tape[_recording.position]
        _recording.position += 1
    else:
        result = receive()
        _recording.tape.append(result)
    return tuple(None if x is None else x.detach() for x in result)


@contextmanager
def _recording_to(tape: list[Any], position: int | None) -> Iterator[None]:
    outer = _recording.tape, _recording.position
    _recording.tape, _recording.position = tape, position
    try:
        yield
    finally:
        _recording.tape, _recording.position = outer


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for torch.utils.checkpoint (use_reentrant=False): the recomputation communicates nothing.

    The forward records the states that entered the layers; the recomputation reads them by index instead of asking the
    other ranks again (LASP's state caching, arXiv 2404.02882). Three checkpointed linear layers make 6 collectives
    instead of 9, with the same gradients. Reentrant checkpoints, and those without this, are correct and communicate
    again.
    """
    tape: list[Any] = []
    return _recording_to(tape, None), _Replay(tape)


class _Replay:
    """Re-enterable: a graph that is kept may be recomputed more than once, each time from the first record."""

    def __init__(self, tape: list[Any]) -> None:
        self._tape = tape
        self._open: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._open.append(_recording_to(self._tape, 0))
        self._open[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)
