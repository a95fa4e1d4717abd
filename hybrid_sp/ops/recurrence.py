"""The one LASP-2 schedule of every recurrence on states (arXiv 2502.07563, algorithms 2 and 4).

    forward     states | launch | intra | wait, fold | inter
    backward    inter | launch | intra | wait, fold | states

The forward is written below. Autograd makes the backward from it: nodes made later run earlier, and `start` and
`finish` swap their roles, one launching where the other waits (`overlap.py`). The arithmetic follows the contract
`kernels/phases.py`.

Backward starts with the last phase, so that phase saves every tensor that backward needs. Each phase then hands the
next one its inputs, through `_Backward`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import run_steps
from ..exchange import Request, make_exchange
from ..kernels.phases import Inputs, Options, Phases, Recurrence
from ..kernels.pieces import Spans
from ..overlap import Call, finish, start
from ..shard import Shard

Output = tuple[Tensor, Tensor | None]


def run_recurrence(recurrence: type[Recurrence], x: Inputs, shard: Shard, **options: Any) -> Output:
    """Run `recurrence_steps` from begin to end."""
    return run_steps(recurrence_steps(recurrence, x, shard, **options))


def recurrence_steps(
    recurrence: type[Recurrence],
    x: Inputs,
    shard: Shard,
    *,
    scale: float,
    dtype: torch.dtype,
    initial: Tensor | None,
    final: bool,
    known_decays: Tensor | None = None,
) -> Generator[None, None, Output]:
    """Return o [B,T,H,V] in the precision of the implementation, and if `final` the state after the sequence.

    It yields once, with the exchange in flight.

    scale, dtype  as in `Options`
    initial       the state before the sequence [B,H,K,V], or None
    known_decays  log decays [n,1,H] or [n,1,1] of all spans, if every rank knows them: they are not sent
    """
    exchanged = shard.span_count > 1 or initial is not None or final  # else nobody reads the summaries
    options = Options(scale, exchanged, dtype)
    phases, x = recurrence.prepare(x, Spans(shard.span_lengths, shard.local_boundaries), options)
    q_first, q_second = (x.q, x.q.detach()) if phases.q_in_states else (x.q.detach(), x.q)
    S_in = S_final = None
    with Call(shard, "linear") as call:
        backward = _Backward(call, phases)
        # 1. Summarise each of this rank's spans as an affine map of the state.
        edge, state, transition, work = _States.apply(backward, x, q_first, x.k, x.v, x.g, x.beta)
        # 2. Send the summaries to the other ranks, unless nobody reads them.
        if exchanged:
            exchange = make_exchange(shard, state, transition, Request(known_decays, initial is not None, final))
            token = start(call, exchange, state, transition, initial)
        yield
        # 3. Meanwhile, compute the output that needs no other rank.
        o, work = _Intra.apply(backward, x, work, edge, q_second, x.bonus)
        # 4. Wait, and fold the summaries of earlier spans into the states that enter this rank's spans.
        if exchanged:
            S_in, S_final = finish(call, exchange, token)
        # 5. Add the contribution of the entering states.
        o, S_final = _Inter.apply(backward, x, work, o, S_in, S_final)
    return o, S_final if final else None


class _Backward:
    """The values that one backward pass hands on: first from inter to intra, then from intra to states."""

    def __init__(self, call: Call, phases: Phases[Any, Any, Any, Any]) -> None:
        self.call, self.phases = call, phases
        self._handed: Any = None

    def hand(self, value: Any, reached: bool) -> None:
        """Keep a value for the next phase, if the pass reaches it."""
        self._handed = value if reached else None

    def take(self) -> Any:
        """Return the value of the phase before, once."""
        value, self._handed = self._handed, None
        return value


class _States(torch.autograd.Function):
    """The node of phase 1. Its empty output `edge` makes autograd run its backward after that of phase 2."""

    @staticmethod
    def forward(
        ctx: Any, backward: _Backward, x: Inputs, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
        with backward.call.phase("states", "forward", k):
            summary, work = backward.phases.states_forward(x)
        transition, state = summary or (None, None)
        if transition is not None:
            ctx.mark_non_differentiable(transition)
        ctx.set_materialize_grads(False)
        ctx.backward_pass = backward
        return k.new_empty(0), state, transition, work

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_edge: Tensor, dS_out: Tensor | None, *_: None) -> Any:
        backward = ctx.backward_pass
        with backward.call.phase("states", "backward", d_edge):
            dq, dk, dv, dg, dbeta = backward.phases.states_backward(backward.take(), dS_out)
        return None, None, dq, dk, dv, dg, dbeta


class _Intra(torch.autograd.Function):
    """The node of phase 2, independent of every other rank."""

    @staticmethod
    def forward(
        ctx: Any, backward: _Backward, x: Inputs, work: Any, edge: Tensor, q: Tensor, bonus: Tensor | None
    ) -> tuple[Tensor, Any]:
        ctx.backward_pass = backward
        with backward.call.phase("intra", "forward", q):
            return backward.phases.intra_forward(x, work)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: None) -> Any:
        backward = ctx.backward_pass
        with backward.call.phase("intra", "backward", do):
            dq, d_bonus, local = backward.phases.intra_backward(backward.take())
        backward.hand(local, reached=ctx.needs_input_grad[3])
        return None, None, None, do.new_empty(0), dq, d_bonus


class _Inter(torch.autograd.Function):
    """The node of phase 3. The final state passes through, so that a loss on it alone goes back through every phase."""

    @staticmethod
    def forward(
        ctx: Any,
        backward: _Backward,
        x: Inputs,
        work: Any,
        o_intra: Tensor,
        S_in: Tensor | None,
        S_final: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        with backward.call.phase("inter", "forward", o_intra):
            o, saved = backward.phases.inter_forward(x, work, o_intra, S_in)
        if o is o_intra:
            ctx.mark_dirty(o_intra)
        ctx.save_for_backward(*x, S_in, *saved)
        ctx.backward_pass, ctx.kind = backward, type(saved)
        return o, S_final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, d_final: Tensor | None) -> Any:
        backward = ctx.backward_pass
        # In a checkpointed block, this recomputes the forward: before the phase begins.
        q, k, v, g, beta, bonus, S_in, *saved = ctx.saved_tensors
        with backward.call.phase("inter", "backward", do):
            dS_in, read = backward.phases.inter_backward(do, Inputs(q, k, v, g, beta, bonus), ctx.kind(*saved), S_in)
        backward.hand(read, reached=ctx.needs_input_grad[3])
        return None, None, None, do, dS_in, d_final
