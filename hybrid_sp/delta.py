"""The delta rule whose sequence is cut over ranks: DeltaNet, Gated DeltaNet and Kimi Delta Attention.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_(t-1) + beta_t k_t v_t^T          o_t = scale * q_t S_t

The schedule is `_causal` below, that of linear attention with dense transitions; the mathematics of a phase is in
`kernels/delta.py`, of the exchange in `state.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .exchange import exchange_of
from .heads import FORMS, by_heads
from .kernels import delta as kernel
from .kernels.chunks import Chunks, cut
from .kernels.delta import Local
from .layout import Shard
from .overlap import Call, finish, start
from .public import compute_dtype, operator, require, require_recurrence, require_state, shard_of


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
                dtype
    scale       None is K**-0.5
    shard       this rank's part of the sequence (`SequenceParallel.shard`), None for one device
    initial_state       state before the first token of the sequence [B,H,K,V], equal on all ranks. Each rank's gradient
                        is its contribution: their sum is the gradient
    return_final_state  also return the state after the last token, equal on all ranks; in backward the gradients that
                        the ranks give it are summed. States are fp32 (fp64 for fp64)

    Returns o [B,T,H,V], or (o, final_state). Communicates one exchange each way (`SequenceParallel.linear`): as an
    all-gather K*V + K*K numbers per span, row of the batch and head forward, and K*V backward. Raises ValueError for
    shapes and dtypes that do not fit, before any communication.

    Sources: the rule, arXiv 2102.11174, section 4.2; its chunkwise form, arXiv 2406.06484, section 3; decays, arXiv
    2412.06464 ([B,T,H]) and 2510.26692 ([B,T,H,K]); the exchange, LASP-2, arXiv 2502.07563, algorithms 2 and 4.
    """
    shard = shard_of(shard, q)
    _check(q, k, v, beta, log_decay, shard, initial_state, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if shard.sp.linear in FORMS:
        alone = functools.partial(delta_rule, scale=scale, return_final_state=return_final_state, backend=backend)
        tokens = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}
        return by_heads("delta_rule", alone, shard, "linear", tokens, initial_state)
    dtype = compute_dtype(q)
    g = None if log_decay is None else log_decay.to(dtype)
    o, final = _causal(
        q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype), g, initial_state, return_final_state, scale, shard
    )
    o = o.to(q.dtype)
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
) -> tuple[Tensor, Tensor | None]:
    """LASP-2, algorithms 2 and 4, with transitions that are sent beside the states."""
    chunks = cut(shard.span_lengths, v.shape[0] * v.shape[2], shard.local_boundaries)
    exchanged = shard.span_count > 1 or initial is not None or final  # else nobody reads a summary
    entering = S_final = None
    with Call(shard, "linear") as call:
        carry = _Carry(call)
        h, leaving, transitions, D, A, inverse, w, r0 = _States.apply(carry, k, v, beta, g, exchanged, chunks)
        if exchanged:
            exchange = exchange_of(shard, leaving, transitions, known=None, entered=initial is not None, final=final)
            token = start(call, exchange, leaving, transitions, initial)
        o_intra, e = _Intra.apply(carry, q, k, v, beta, g, h, D, inverse, w, r0, scale, chunks)
        if exchanged:
            entering, S_final = finish(call, exchange, token)
        o, S_final = _Inter.apply(carry, o_intra, e, h, D, entering, S_final, scale, chunks)
    return o, S_final if final else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    shard: Shard,
    initial_state: Tensor | None,
    backend: str,
) -> None:
    name = "delta_rule"
    left = shard.sp.linear == "ring_attention"
    require(not left, name, 'linear="ring_attention" takes linear_attention alone: the delta rule has no left product')
    require_recurrence(name, q, k, v, shard, backend)
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


class _Carry:
    """What one backward pass hands from phase to phase, beside what autograd hands: `_Inter` the entering states to
    `_Intra`, and that its part of the gradients to `_States`, which adds its own."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.entering: Tensor | None = None
        self.local: list[Local] = []


class _States(torch.autograd.Function):
    """Phase 1. Of what it returns, only h and the leaving states have gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        carry: _Carry,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        entered: bool,
        chunks: Chunks,
    ) -> tuple[Tensor | None, ...]:
        with carry.call.phase("states", "forward", k):
            states = kernel.states_forward(k, v, beta, g, entered, chunks)
        ctx.mark_non_differentiable(*(x for x in states[2:] if x is not None))
        ctx.save_for_backward(k, v, beta, g, states.A, states.inverse)
        ctx.carry, ctx.chunks = carry, chunks
        ctx.set_materialize_grads(False)
        return tuple(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, d_leaving: Tensor | None, *_: None) -> Any:
        k, v, beta, g, A, inverse = ctx.saved_tensors
        local, ctx.carry.local = ctx.carry.local, []
        with ctx.carry.call.phase("states", "backward", k):
            grads = kernel.states_backward(dh, d_leaving, k, v, beta, g, A, inverse, local, ctx.chunks)
        return None, *grads, None, None


class _Intra(torch.autograd.Function):
    """Phase 2, independent of every other rank. It takes h so that autograd runs its backward before phase 1's."""

    @staticmethod
    def forward(
        ctx: Any,
        carry: _Carry,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        h: Tensor,
        D: Tensor | None,
        inverse: Tensor,
        w: Tensor,
        r0: Tensor,
        scale: float,
        chunks: Chunks,
    ) -> tuple[Tensor, Tensor]:
        with carry.call.phase("intra", "forward", q):
            o_intra, e = kernel.intra_forward(q, k, beta, g, w, r0, chunks)
        ctx.mark_dirty(w)
        ctx.mark_non_differentiable(e)
        ctx.save_for_backward(q, k, v, beta, g, h, D, inverse)
        ctx.carry, ctx.scale, ctx.chunks = carry, scale, chunks
        return o_intra, e

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: None) -> Any:
        q, k, v, beta, g, h, D, inverse = ctx.saved_tensors
        S_in, ctx.carry.entering = ctx.carry.entering, None
        with ctx.carry.call.phase("intra", "backward", q):
            dq, ctx.carry.local = kernel.intra_backward(
                do, q, k, v, beta, g, h, D, inverse, S_in, ctx.scale, ctx.chunks
            )
        return None, dq, *(None,) * 11


class _Inter(torch.autograd.Function):
    """Phase 3: adds the part of the entering states to the output of phase 2, in its place. The final state passes
    through, so that a loss on it alone goes back through every phase."""

    @staticmethod
    def forward(
        ctx: Any,
        carry: _Carry,
        o_intra: Tensor,
        e: Tensor,
        h: Tensor,
        D: Tensor | None,
        S_in: Tensor | None,
        S_final: Tensor | None,
        scale: float,
        chunks: Chunks,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(e, h, D, S_in)
        ctx.carry, ctx.scale, ctx.chunks = carry, scale, chunks
        ctx.mark_dirty(o_intra)
        with carry.call.phase("inter", "forward", h):
            return kernel.inter_forward(o_intra, e, h, D, S_in, scale, chunks), S_final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, d_final: Tensor | None) -> Any:
        e, h, D, S_in = ctx.saved_tensors
        with ctx.carry.call.phase("inter", "backward", h):
            dh, dS_in = kernel.inter_backward(do, e, h, D, S_in, ctx.scale, ctx.chunks)
        ctx.carry.entering = S_in
        return None, do, None, dh, None, dS_in, d_final, None, None
