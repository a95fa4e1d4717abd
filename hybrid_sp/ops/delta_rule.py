"""The delta rule whose sequence is cut over ranks: DeltaNet, Gated DeltaNet and Kimi Delta Attention.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_(t-1) + beta_t k_t v_t^T          o_t = scale * q_t S_t

The schedule is `_causal` below, that of linear attention with dense transitions; the mathematics of a phase is in
`kernels/reference/delta.py` and, by the passes of fla-core, in `kernels/gpu/fla_delta.py`, of the exchange in
`exchange/affine.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import backend_of
from ..baselines.head_parallel import FORMS, by_heads
from ..checks import compute_dtype, floored, operator, require, require_recurrence, require_state, shard_of
from ..exchange import exchange_of
from ..kernels.gpu import fla_delta as fla
from ..kernels.reference import delta as kernel
from ..kernels.reference.chunks import cut
from ..overlap import Call, finish, start
from ..shard import Shard


@operator
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor | None = None,
    shard: Shard | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The delta rule with any diagonal decay, over the sequence of which `shard` holds this rank's tokens.

    Per head, with a_t = exp(log_decay_t):

        S_t = (I - beta_t k_t k_t^T) diag(a_t) S_(t-1) + beta_t k_t v_t^T          o_t = scale * q_t S_t

    A token replaces the part beta of what the decayed state holds for its key by its value. The caller normalises k
    (L2, per head): with |k_t| = 1 and beta in [0, 2] no state grows of itself; beta over 1 gives transitions with
    negative eigenvalues.

    q, k        [B,T,G,K]; value head h reads key head h // (H // G)
    v           [B,T,H,V], H a multiple of G; q, k and v share a dtype, and o has it
    beta        [B,T,H], any float dtype
    log_decay   natural logs, finite, at most 0: None (DeltaNet) | [B,T,H] (Gated DeltaNet) | [B,T,H,K] (KDA); any float
                dtype. Those from -1e4 down to the smallest float leave nothing of a state, and cost other tokens
                nothing (on fla's passes up to 1e-4)
    scale       a number, no tensor (its gradient would be lost); None is K**-0.5
    shard       this rank's part of the sequence (`SequenceParallel.shard`), None for one device
    initial_state       state before the first token of the sequence [B,H,K,V], equal on all ranks. Each rank's gradient
                        is its contribution: their sum is the gradient
    return_final_state  also return the state after the last token, equal on all ranks; in backward the gradients that
                        the ranks give it are summed. States are fp32 (fp64 for fp64)

    Returns o [B,T,H,V], or (o, final_state). Communicates one exchange each way (`SequenceParallel.linear`): as an
    all-gather K*V + K*K numbers per span, row of the batch and head forward, and K*V backward. Raises ValueError for
    shapes and dtypes that do not fit and for a decay of -inf, before any communication. On CUDA, where the host does
    not look at values, -inf is taken as the smallest float.

    Sources: the rule, arXiv 2102.11174, section 4.2; its chunkwise form, arXiv 2406.06484, section 3; decays, arXiv
    2412.06464 ([B,T,H]) and 2510.26692 ([B,T,H,K]); the exchange, LASP-2, arXiv 2502.07563, algorithms 2 and 4.
    """
    shard = shard_of(shard, q)
    _check(q, k, v, beta, log_decay, shard, initial_state)
    log_decay = floored("delta_rule", log_decay, compute_dtype(q))
    backend = backend_of("delta_rule", backend, q, q.shape[3], v.shape[3])
    if backend == "fla":
        fla.passes()  # what it misses is said here
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if shard.sp.linear in FORMS:
        alone = functools.partial(delta_rule, scale=scale, return_final_state=return_final_state, backend=backend)
        tokens = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}
        return by_heads("delta_rule", alone, shard, "linear", tokens, initial_state)
    o, final = _causal(q, k, v, beta, log_decay, initial_state, return_final_state, scale, shard, backend)
    return o if final is None else (o, final)


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    final: bool,
    scale: float,
    shard: Shard,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """LASP-2, algorithms 2 and 4, with transitions that are sent beside the states."""
    exchanged = shard.span_count > 1 or initial is not None or final  # else nobody reads a summary
    dtype, wide = q.dtype, compute_dtype(q)
    beta, g = beta.to(wide), None if g is None else g.to(wide)
    phases: Phases
    if backend == "fla":
        phases = fla.Phases(fla.cut(shard.span_lengths, len(v), shard.local_boundaries, v.device), scale, exchanged)
        g = fla.decay_of(g, k.shape[-1])
    else:
        chunks = cut(shard.span_lengths, v.shape[0] * v.shape[2], shard.local_boundaries)
        phases = kernel.Phases(chunks, scale, exchanged)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    entering = S_final = None
    with Call(shard, "linear") as call:
        carry = _Carry(call, phases)
        states = _States.apply(carry, q if phases.q_in_states else q.detach(), k, v, beta, g)
        _, leaving, transitions, *_ = states
        if exchanged:
            exchange = exchange_of(shard, leaving, transitions, known=None, entered=initial is not None, final=final)
            token = start(call, exchange, leaving, transitions, initial)
        o_intra, e = _Intra.apply(carry, q, k, v, beta, g, *states)
        if exchanged:
            entering, S_final = finish(call, exchange, token)
        o, S_final = _Inter.apply(carry, o_intra, e, entering, S_final, *states)
    return o.to(dtype), S_final if final else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    shard: Shard,
    initial_state: Tensor | None,
) -> None:
    name = "delta_rule"
    left = shard.sp.linear == "ring_attention"
    require(not left, name, 'linear="ring_attention" takes linear_attention alone: the delta rule has no left product')
    require_recurrence(name, q, k, v, shard)
    tokens, key = tuple(v.shape[:3]), q.shape[3]
    require(tuple(beta.shape) == tokens, name, f"beta must be {tokens}, got {tuple(beta.shape)}")
    require(beta.dtype.is_floating_point, name, f"beta must be floating point, got {beta.dtype}")
    if log_decay is not None:
        allowed = [tokens, (*tokens, key)]
        require(
            tuple(log_decay.shape) in allowed,
            name,
            f"log_decay must be one of {allowed}, got {tuple(log_decay.shape)}",
        )
    if initial_state is not None:
        require_state(name, (initial_state,), [(q.shape[0], v.shape[2], key, v.shape[3])], compute_dtype(q))


class Phases(Protocol):
    """The arithmetic of one call: three phases forward and back, between which `_causal` communicates.

    The forward of a phase also gives what its backward asks to have saved, that of the states what the other phases
    ask for: a tuple that begins with h, the states that leave the spans [s,B,H,K,V] and their transitions. The gradient
    of q comes from `intra_backward` or, if `q_in_states`, with those of k, v, beta and g from `states_backward`.
    """

    q_in_states: ClassVar[bool]

    def states_forward(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> Any: ...

    def intra_forward(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, states: Sequence[Any]
    ) -> Any: ...

    def inter_forward(self, o_intra: Tensor, e: Any, states: Sequence[Any], S_in: Tensor | None) -> Any: ...

    def inter_backward(self, do: Tensor, saved: Sequence[Any]) -> Any: ...

    def intra_backward(self, do: Tensor, saved: Sequence[Any], S_in: Tensor | None) -> Any: ...

    def states_backward(self, dh: Any, d_leaving: Tensor | None, saved: Sequence[Any], local: Any) -> Any: ...


class _Carry:
    """What one backward pass hands from phase to phase, beside what autograd hands: `_Inter` the entering states to
    `_Intra`, and that its part of the gradients to `_States`, which adds its own."""

    def __init__(self, call: Call, phases: Phases) -> None:
        self.call, self.phases = call, phases
        self.entering: Tensor | None = None
        self.local: Any = None


class _States(torch.autograd.Function):
    """Phase 1. Of what it returns, only h and the leaving states have gradients."""

    @staticmethod
    def forward(
        ctx: Any, carry: _Carry, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with carry.call.phase("states", "forward", k):
            states, saved = carry.phases.states_forward(q, k, v, beta, g)
        ctx.mark_non_differentiable(*(x for x in states[2:] if x is not None))
        ctx.save_for_backward(k, *saved)
        ctx.carry = carry
        ctx.set_materialize_grads(False)
        return tuple(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, d_leaving: Tensor | None, *_: None) -> Any:
        carry, (k, *saved) = ctx.carry, ctx.saved_tensors
        local, carry.local = carry.local, None
        with carry.call.phase("states", "backward", k):
            return None, *carry.phases.states_backward(dh, d_leaving, saved, local)


class _Intra(torch.autograd.Function):
    """Phase 2, independent of every other rank. It takes h so that autograd runs its backward before phase 1's."""

    @staticmethod
    def forward(
        ctx: Any, carry: _Carry, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, *states: Any
    ) -> tuple[Tensor, Tensor | None]:
        with carry.call.phase("intra", "forward", q):
            o_intra, e, saved = carry.phases.intra_forward(q, k, v, beta, g, states)
        ctx.mark_dirty(*(x for x in states if x is e and e is not None))
        if e is not None:
            ctx.mark_non_differentiable(e)
        ctx.save_for_backward(*saved)
        ctx.carry, ctx.inputs = carry, 5 + len(states)
        return o_intra, e

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: None) -> Any:
        carry, saved = ctx.carry, ctx.saved_tensors
        S_in, carry.entering = carry.entering, None
        with carry.call.phase("intra", "backward", do):
            dq, carry.local = carry.phases.intra_backward(do, saved, S_in)
        return None, dq, *(None,) * (ctx.inputs - 1)


class _Inter(torch.autograd.Function):
    """Phase 3: adds the part of the entering states to the output of phase 2, in its place. The final state passes
    through, so that a loss on it alone goes back through every phase."""

    @staticmethod
    def forward(
        ctx: Any,
        carry: _Carry,
        o_intra: Tensor,
        e: Tensor | None,
        S_in: Tensor | None,
        S_final: Tensor | None,
        *states: Any,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.mark_dirty(o_intra)
        with carry.call.phase("inter", "forward", o_intra):
            o, saved = carry.phases.inter_forward(o_intra, e, states, S_in)
        ctx.save_for_backward(S_in, *saved)
        ctx.carry, ctx.states = carry, len(states)
        return o, S_final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, d_final: Tensor | None) -> Any:
        carry, (S_in, *saved) = ctx.carry, ctx.saved_tensors
        with carry.call.phase("inter", "backward", do):
            dh, dS_in = carry.phases.inter_backward(do, saved)
        carry.entering = S_in
        return None, do, None, dS_in, d_final, dh, *(None,) * (ctx.states - 1)
