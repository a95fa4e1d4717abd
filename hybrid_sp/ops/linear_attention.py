"""Linear attention whose sequence is cut over ranks: LASP-2 for every decay that acts on the key channels.

    S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T          o_t = scale * q_t S_t

The schedule is `_causal` below; the mathematics of a phase is in `kernels/reference/linear.py`, of the exchange in
`exchange/affine.py`.
"""

from __future__ import annotations

import functools
import itertools
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import backend_of, needs
from ..baselines.head_parallel import FORMS, by_heads
from ..baselines.linear_ring_attention import left_product
from ..checks import compute_dtype, floored, operator, require, require_recurrence, require_state, shard_of
from ..exchange import AllGatherSum, exchange_of
from ..kernels.reference import linear as kernel
from ..kernels.reference.linear import Plan
from ..overlap import Call, finish, start
from ..shard import Shard

State = Tensor | tuple[Tensor, Tensor]

EPSILON = 1e-10  # added to the normaliser's denominator


@operator
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    shard: Shard | None = None,
    scale: float | None = None,
    causal: bool = True,
    normalize: bool = False,
    initial_state: State | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Linear attention with any diagonal decay, over the sequence of which `shard` holds this rank's tokens.

    Per head, with a_t = exp(log_decay_t):

        S_t = diag(a_t) S_(t-1) + k_t v_t^T          o_t = scale * q_t S_t

    A bonus u makes a token read the state before it: o_t = scale * q_t (S_(t-1) + diag(u) k_t v_t^T). normalize=True
    also keeps z_t = diag(a_t) z_(t-1) + k_t and returns o_t / (scale * q_t z_t + 1e-10), for features whose products
    are not negative. causal=False reads the state of the whole sequence at every token; it takes no decay, no bonus, no
    states and no documents. Of packed documents (`Shard.cu_seqlens`) each begins with an empty state; the initial state
    continues the first one.

    q, k        [B,T,G,K]; value head h reads key head h // (H // G)
    v           [B,T,H,V], H a multiple of G; q, k and v share a dtype, and o has it
    log_decay   natural logs, finite, at most 0: None | [H] (fixed per head) | [B,T,H] | [B,T,H,K]; any float dtype.
                Those from -1e4 down to the smallest float leave nothing of a state, and cost other tokens nothing
    bonus       [H,K], any float dtype
    scale       a number, no tensor (its gradient would be lost); None is K**-0.5
    shard       this rank's part of the sequence (`SequenceParallel.shard`), None for one device
    initial_state       state before the first token of the sequence [B,H,K,V], with normalize (S, z [B,H,K]); equal on
                        all ranks. Each rank's gradient is its contribution: their sum is the gradient
    return_final_state  also return the state after the last token, equal on all ranks; in backward the gradients that
                        the ranks give it are summed. States are fp32 (fp64 for fp64)

    Returns o [B,T,H,V], or (o, final_state). Communicates one exchange each way (`SequenceParallel.linear`; of states
    without a mask always an all-gather), of a size that does not depend on T unless it is a baseline. Raises ValueError
    for shapes and dtypes that do not fit, for a decay of -inf and for what a baseline cannot do, before any
    communication. On CUDA, where the host does not look at values, -inf is taken as the smallest float.

    Sources: LASP-2, arXiv 2502.07563, algorithms 1 to 4; decays as in arXiv 2307.08621 ([H]), 2405.21060 ([B,T,H]),
    2312.06635 ([B,T,H,K]); bonus, arXiv 2404.05892, equation 18.
    """
    shard = shard_of(shard, q)
    _check(q, k, v, log_decay, bonus, shard, causal, initial_state, return_final_state, normalize)
    log_decay = floored("linear_attention", log_decay, compute_dtype(q))
    by_states = causal and shard.sp.linear != "ring_attention"
    only = "" if by_states else "has the causal form by states alone"
    backend = backend_of("linear_attention", backend, q, q.shape[3], v.shape[3], only_torch=only)
    phases_of(backend)  # what it misses is said here
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if shard.sp.linear in FORMS:
        alone = functools.partial(
            linear_attention,
            scale=scale,
            causal=causal,
            normalize=normalize,
            return_final_state=return_final_state,
            backend=backend,
        )
        fixed = log_decay is not None and log_decay.ndim == 1
        tokens = {"q": q, "k": k, "v": v, "log_decay": None if fixed else log_decay}
        parameters = {"bonus": bonus} | ({"log_decay": log_decay} if fixed else {})
        return by_heads("linear_attention", alone, shard, "linear", tokens, initial_state, parameters)
    if shard.sp.linear == "ring_attention":
        states = {"bonus": bonus, "initial_state": initial_state, "final state": return_final_state or None}
        o, final = left_product(q, k, v, log_decay, shard, causal, normalize, scale, states), None
    else:
        o, final = _by_states(
            q, k, v, log_decay, bonus, initial_state, return_final_state, scale, causal, normalize, shard, backend
        )
    width = v.shape[-1]
    if normalize:
        o = o[..., :width] / (o[..., width:] + EPSILON)
    o = o.to(q.dtype)
    if final is None:
        return o
    return o, (final[..., :width], final[..., width]) if normalize else final


def _by_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    initial_state: State | None,
    final: bool,
    scale: float,
    causal: bool,
    normalize: bool,
    shard: Shard,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """o, to be rounded, and the final state; with normalize their last column is the normaliser's."""
    dtype, phases = compute_dtype(q), phases_of(backend)
    out = dtype if normalize else q.dtype
    if phases is kernel:
        q, k, v, out = q.to(dtype), k.to(dtype), v.to(dtype), dtype
    g = None if log_decay is None else log_decay.to(dtype)
    u = None if bonus is None else bonus.to(dtype)
    if normalize:
        v = F.pad(v, (0, phases.PADDING), value=1.0)[..., : v.shape[-1] + 1]
    initial = initial_state if isinstance(initial_state, Tensor) else None
    if isinstance(initial_state, tuple):
        initial = torch.cat([initial_state[0], initial_state[1].unsqueeze(-1)], -1)
    if causal:
        return _causal(q, k, v, g, u, initial, final, scale, shard, phases, out)
    return _bidirectional(q, k, v, scale, shard), None


def phases_of(backend: str) -> Any:
    """The module that has the phases of this backend."""
    if backend == "torch":
        return kernel
    with needs(backend):
        from ..kernels.gpu import linear

    return linear


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    initial: Tensor | None,
    final: bool,
    scale: float,
    shard: Shard,
    phases: Any,
    out: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """LASP-2, algorithm 2; its mirror image, algorithm 4, is what autograd makes of it."""
    chunks = phases.partition(shard.span_lengths, shard.local_boundaries, v)
    known = None  # log decays that every rank knows of every span, [n,1,H] or [n,1,1]
    if g is None and (shard.boundaries or bonus is not None):
        known = v.new_zeros(shard.span_count, 1, 1, dtype=compute_dtype(v))
    elif g is not None and g.ndim == 1:
        known = (_lengths(shard.bounds, g.dtype, g.device)[:, None] * g.detach()).unsqueeze(1)
        g = g.expand(*v.shape[:3])
    if known is not None:
        known[list(shard.broken)] = float("-inf")
    of_head = g is not None and g.ndim == 3
    if bonus is not None and phases is not kernel:  # which knows a bonus beside decays per key channel only
        g = v.new_zeros(1, 1, 1, dtype=bonus.dtype) if g is None else g
        g = g if g.ndim == 4 else g.unsqueeze(-1).expand(*v.shape[:3], k.shape[3])
    entering = S_final = None
    exchanged = shard.span_count > 1 or initial is not None or final  # else nobody reads a summary
    plan = Plan(chunks, scale, exchanged, g is not None and g.requires_grad, out)
    with Call(shard, "linear") as call:
        carry = _Carry(call, phases, plan)
        h, leaving, totals = _States.apply(carry, k, v, g)
        if exchanged:
            decays = _span_decays(totals, chunks)
            if of_head and decays is not None and decays.ndim == 4:
                decays = decays[..., 0]  # one number a head is sent, also where the phases took one a channel
            exchange = exchange_of(shard, leaving, decays, known=known, entered=initial is not None, final=final)
            token = start(call, exchange, leaving, decays, initial)
        o_intra = _Intra.apply(carry, q, k, v, g, bonus, h, totals)
        if exchanged:
            entering, S_final = finish(call, exchange, token)
        o, S_final = _Inter.apply(carry, o_intra, q, k, g, bonus, h, totals, entering, S_final)
    return o, S_final if final else None


def _bidirectional(q: Tensor, k: Tensor, v: Tensor, scale: float, shard: Shard) -> Tensor:
    """LASP-2, algorithms 1 and 3: every query reads the sum over all spans, and nothing hides the gather."""
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    exchange = AllGatherSum(shard)
    with Call(shard, "linear") as call:
        token = start(call, exchange, torch.einsum("bthk,bthv->bhkv", k, v), None)
        total, _ = finish(call, exchange, token)
    return torch.einsum("bthk,bhkv->bthv", q * scale, total)


@functools.lru_cache(maxsize=32)
def _lengths(bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tokens of each span; kept, since what is made of numbers of the host makes it wait for the device."""
    return torch.tensor([b - a for a, b in itertools.pairwise(bounds)], dtype=dtype, device=device)


def _span_decays(totals: Tensor | None, chunks: Any) -> Tensor | None:
    """Log decay of each span, [s,B,H] or [s,B,H,K], from that of its chunks; -inf if a document begins in the span."""
    if totals is None:
        return None
    spans = [totals[chunks.of_span(i)].sum(0) for i in range(chunks.spans)]
    return torch.stack(
        [x if whole else torch.full_like(x, float("-inf")) for x, whole in zip(spans, chunks.open, strict=True)]
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    shard: Shard,
    causal: bool,
    initial_state: State | None,
    return_final_state: bool,
    normalize: bool,
) -> None:
    name = "linear_attention"
    require_recurrence(name, q, k, v, shard)
    heads, key = v.shape[2], q.shape[3]
    if log_decay is not None:
        allowed = [(heads,), (*v.shape[:3],), (*v.shape[:3], key)]
        require(
            tuple(log_decay.shape) in allowed,
            name,
            f"log_decay must be one of {allowed}, got {tuple(log_decay.shape)}",
        )
    if bonus is not None:
        require(tuple(bonus.shape) == (heads, key), name, f"bonus must be {(heads, key)}, got {tuple(bonus.shape)}")
    if not causal:
        for given, what in ((log_decay, "log_decay"), (bonus, "bonus"), (initial_state, "initial_state")):
            require(given is None, name, f"causal=False takes no {what}")
        require(shard.cu_seqlens is None, name, "causal=False takes no packed documents")
        require(not return_final_state, name, "causal=False has no final state; return_final_state must be False")
    if initial_state is not None:
        parts = initial_state if isinstance(initial_state, tuple) else (initial_state,)
        shapes = [(q.shape[0], heads, key, v.shape[3]), (q.shape[0], heads, key)][: 2 if normalize else 1]
        require_state(name, parts, shapes, compute_dtype(q))


class _Carry:
    """What one call hands from phase to phase, forward and then backward, beside what autograd hands."""

    def __init__(self, call: Call, phases: Any, plan: Plan) -> None:
        self.call, self.phases, self.plan = call, phases, plan
        self._kept: Any = None

    def phase(self, name: str, direction: str, x: Tensor) -> AbstractContextManager[None]:
        return self.call.phase(name, direction, x)

    def keep(self, kept: Any) -> None:
        self._kept = kept

    def take(self) -> Any:
        kept, self._kept = self._kept, None
        return kept


class _States(torch.autograd.Function):
    """Phase 1. Returns h, the states that leave the spans [s,B,H,K,V], and the log decays of chunks, without a
    gradient."""

    @staticmethod
    def forward(
        ctx: Any, carry: _Carry, k: Tensor, v: Tensor, g: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        with carry.phase("states", "forward", k):
            h, leaving, totals, kept = carry.phases.states_forward(k, v, g, carry.plan)
        carry.keep(kept)
        ctx.carry = carry
        ctx.save_for_backward(k, v, g, h, totals)
        ctx.set_materialize_grads(False)
        if totals is not None:
            ctx.mark_non_differentiable(totals)
        return h, leaving, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, d_leaving: Tensor | None, _: None) -> Any:
        carry, (k, v, g, h, totals) = ctx.carry, ctx.saved_tensors
        with carry.phase("states", "backward", k):
            grads = carry.phases.states_backward(dh, d_leaving, k, v, g, h, totals, carry.take(), carry.plan)
        return None, *grads


class _Intra(torch.autograd.Function):
    """Phase 2, independent of every other rank. It takes h so that autograd runs its backward before phase 1's."""

    @staticmethod
    def forward(
        ctx: Any,
        carry: _Carry,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        bonus: Tensor | None,
        h: Tensor,
        totals: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, g, bonus, h, totals)
        ctx.carry = carry
        with carry.phase("intra", "forward", q):
            o_intra, kept = carry.phases.intra_forward(q, k, v, g, bonus, h, carry.take(), carry.plan)
        carry.keep(kept)
        return o_intra

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> Any:
        carry, (q, k, v, g, bonus, h, totals) = ctx.carry, ctx.saved_tensors
        with carry.phase("intra", "backward", q):
            dq, d_bonus, kept = carry.phases.intra_backward(do, q, k, v, g, bonus, h, totals, carry.take(), carry.plan)
        carry.keep(kept)
        return None, dq, None, None, None, d_bonus, None, None


class _Inter(torch.autograd.Function):
    """Phase 3: adds the part of the entering states to the output of phase 2. The final state passes through, so that a
    loss on it alone goes back through every phase."""

    @staticmethod
    def forward(
        ctx: Any,
        carry: _Carry,
        o_intra: Tensor,
        q: Tensor,
        k: Tensor,
        g: Tensor | None,
        bonus: Tensor | None,
        h: Tensor,
        totals: Tensor | None,
        S_in: Tensor | None,
        S_final: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(q, k, g, bonus, h, totals, S_in)
        ctx.carry = carry
        with carry.phase("inter", "forward", q):
            o = carry.phases.inter_forward(o_intra, q, k, g, bonus, h, totals, S_in, carry.take(), carry.plan)
        if o is o_intra:
            ctx.mark_dirty(o_intra)
        return o, S_final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, d_final: Tensor | None) -> Any:
        carry, (q, k, g, bonus, h, totals, S_in) = ctx.carry, ctx.saved_tensors
        with carry.phase("inter", "backward", q):
            dh, dS_in, kept = carry.phases.inter_backward(do, q, k, g, bonus, h, totals, S_in, carry.plan)
        carry.keep(kept)
        return None, do, None, None, None, None, dh, None, dS_in, d_final
