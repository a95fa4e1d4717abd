"""Start/finish pairs: communication that overlaps with computation, written once forward and mirrored by autograd.

An operator calls `start`, computes the part that needs no other rank, and calls `finish`. The two are autograd nodes
joined by a token, an empty tensor:

    forward     start launches | local work | finish waits
    backward    finish launches | gradient of the local work | start waits

Autograd runs nodes in the reverse of the order in which they were made, so backward is the mirror image. The nodes of
one operator call share a `Call`. An `Exchange` decides what to send and how to use what arrives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .comm import ledger
from .comm.pending import Header, Pending
from .recompute import is_replaying, recorded
from .shard import Shard


class Exchange(Protocol):
    """The contract of an exchange: how `start` and `finish` treat the summaries of one operator call.

    launch            send this rank's summaries
    receive           turn what arrives into the entering states, the final state, and a tensor that backward needs,
                      such as the transitions
    launch_backward   send the gradients of the entering states and of the final state
    receive_backward  turn what arrives into the gradients of the states that leave this rank's spans, and this rank's
                      part of the initial state's gradient

    Transitions get no gradient from the exchange. The gradient of a decay needs only the states at both ends of a span,
    and the operator has both by then.
    """

    def launch(self, header: Header, state: Tensor, transition: Tensor | None, initial: Tensor | None) -> Pending: ...

    def receive(self, received: Any) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def launch_backward(self, header: Header, d_entering: Tensor, d_final: Tensor, kept: Tensor | None) -> Pending: ...

    def receive_backward(self, received: Any, kept: Tensor | None) -> tuple[Tensor, Tensor | None]: ...


class Call:
    """The context of one operator call: its messages in flight, first in first out, and its number for headers.

    There is one queue for "forward", one for gradients ("backward"), and one for data that backward gathers a second
    time ("again"). The call is a context manager around start ... finish. If an exception falls between, it drains the
    queues, so that the other ranks are not left waiting.
    """

    def __init__(self, shard: Shard, tag: str) -> None:
        self.shard, self.sp, self.tag, self.number = shard, shard.sp, tag, next(shard.calls)
        self._in_flight: dict[str, deque[Pending]] = {name: deque() for name in ("forward", "backward", "again")}

    def header(self, direction: str, note: str = "") -> Header:
        return self.shard.header(self.tag, direction, self.number, note)

    def phase(self, name: str, direction: str, x: Tensor) -> AbstractContextManager[None]:
        """Record the computation inside as a phase on the ledger, on the device of x; waits inside are excluded."""
        return ledger.computing(name, self.tag, direction, self.number, x.device)

    def launch(self, queue: str, launch: Callable[[], Pending]) -> None:
        """Launch into a queue; not forward in the recomputation of a checkpoint that has recorded the result."""
        if queue == "forward" and is_replaying():
            return
        pending = launch()
        if not self.sp.overlaps(self.tag):
            result = pending.wait()
            pending = Pending(lambda: result)
        self._in_flight[queue].append(pending)

    def result(self, queue: str) -> Any:
        """Wait for the first in a queue, and return its result."""
        assert self._in_flight[queue], f"nothing is in flight: {queue}"
        return self._in_flight[queue].popleft().wait()

    def drain(self) -> None:
        """Wait for everything in flight, and discard it."""
        for queue in self._in_flight.values():
            while queue:
                queue.popleft().drain()

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.drain()


def start(
    call: Call, exchange: Exchange, state: Tensor, transition: Tensor | None, initial: Tensor | None = None
) -> Tensor:
    """Launch the exchange of this rank's summaries. Returns the token for `finish`."""
    return _Start.apply(call, exchange, state, transition, initial)


def finish(call: Call, exchange: Exchange, token: Tensor) -> tuple[Tensor, Tensor]:
    """Wait, and return the states that enter this rank's spans and the final state."""
    return _Finish.apply(call, exchange, token)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, exchange: Exchange, state: Tensor, transition: Tensor | None, initial: Tensor | None
    ) -> Tensor:
        ctx.call, ctx.exchange = call, exchange
        note = "grad" if any(ctx.needs_input_grad) else "no grad"
        call.launch("forward", lambda: exchange.launch(call.header("forward", note), state, transition, initial))
        return state.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor) -> tuple[None, None, Tensor, None, Tensor | None]:
        received = ctx.call.result("backward")
        with ctx.call.phase("fold", "backward", d_token):
            d_state, d_initial = ctx.exchange.receive_backward(*received)
        return None, None, d_state, None, d_initial if ctx.needs_input_grad[4] else None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, exchange: Exchange, token: Tensor) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.exchange = call, exchange

        def receive() -> tuple[Tensor, Tensor, Tensor | None]:
            received = call.result("forward")
            with call.phase("fold", "forward", token):
                return exchange.receive(received)

        entering, final, kept = recorded(receive)
        ctx.save_for_backward(kept)
        return entering, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_entering: Tensor, d_final: Tensor) -> tuple[None, None, Tensor | None]:
        if not ctx.needs_input_grad[2]:
            return None, None, None
        (kept,) = ctx.saved_tensors
        ctx.call.drain()  # an earlier pass over this graph may have launched, and failed before it waited
        header = ctx.call.header("backward")
        ctx.call.launch(
            "backward",
            lambda: ctx.exchange.launch_backward(header, d_entering, d_final, kept).then(
                lambda received: (received, kept)
            ),
        )
        return None, None, d_entering.new_empty(0)
