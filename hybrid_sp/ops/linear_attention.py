"""The linear attention whose sequence is cut over ranks: LASP-2 for every decay that acts on the key channels.

    S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T          o_t = scale * q_t S_t

The schedule is in `recurrence.py`, the arithmetic of a phase in `kernels/reference/linear.py`, and the arithmetic of
the exchange in `exchange/affine.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import check_triton, needs, select_backend
from ..baselines.head_parallel import HEAD_PARALLEL, run_head_parallel
from ..baselines.linear_ring_attention import left_product
from ..checks import (
    compute_dtype,
    default_shard,
    floor_decays,
    operator_in_steps,
    require,
    require_recurrence,
    require_state,
)
from ..exchange import AllGatherSum
from ..kernels.heads import repeat_heads
from ..kernels.phases import Inputs, Recurrence
from ..kernels.reference import linear as reference
from ..overlap import Call, finish, start
from ..shard import Shard
from ..transfer import to_device
from .recurrence import Output, recurrence_steps

State = Tensor | tuple[Tensor, Tensor]

EPSILON = 1e-10  # added to the normaliser's denominator


@operator_in_steps
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
) -> Generator[None, None, Tensor | tuple[Tensor, State]]:
    """Compute linear attention with any diagonal decay, over the sequence of which `shard` holds this rank's tokens.

    Per head, with a_t = exp(log_decay_t):

        S_t = diag(a_t) S_(t-1) + k_t v_t^T          o_t = scale * q_t S_t

    With a bonus u, a token reads the state before it: o_t = scale * q_t (S_(t-1) + diag(u) k_t v_t^T).

    normalize=True also keeps z_t = diag(a_t) z_(t-1) + k_t and returns o_t / (scale * q_t z_t + 1e-10). It is for
    features whose products are not negative.

    causal=False reads the state of the whole sequence at every token. It takes no decay, no bonus, no states and no
    documents.

    Each packed document (`Shard.cu_seqlens`) begins with an empty state; the initial state continues the first one.

    q, k        [B,T,G,K]; value head h reads key head h // (H // G)
    v           [B,T,H,V], H a multiple of G; q, k and v share a dtype, and o has it
    log_decay   natural logs, finite, at most 0: None | [H] (fixed per head) | [B,T,H] | [B,T,H,K]; any float dtype.
                Decays from -1e4 down to the smallest float erase the state, and cost other tokens no accuracy
    bonus       [H,K], any float dtype
    scale       a number, no tensor (its gradient would be lost); None is K**-0.5
    shard       this rank's part of the sequence (`SequenceParallel.shard`), None for one device
    initial_state       state before the first token of the sequence [B,H,K,V], with normalize (S, z [B,H,K]); equal on
                        all ranks. Each rank's gradient is its contribution: their sum is the gradient
    return_final_state  also return the state after the last token, equal on all ranks; backward sums the gradients that
                        the ranks give it. States are fp32 (fp64 for fp64)
    backend     "torch", "triton" (our kernels), or "auto"

    Returns o [B,T,H,V], or (o, final_state). Communicates one exchange each way (`SequenceParallel.linear`; with
    causal=False always an all-gather). Its size does not depend on T, except in baselines.

    Raises ValueError for shapes and dtypes that do not fit, for a decay of -inf, and for calls that a baseline cannot
    run, before any communication. On CUDA, where the host does not look at values, -inf counts as the smallest float.

    Sources: LASP-2, arXiv 2502.07563, algorithms 1 to 4; decays as in arXiv 2307.08621 ([H]), 2405.21060 ([B,T,H]),
    2312.06635 ([B,T,H,K]); bonus, arXiv 2404.05892, equation 18.
    """
    shard = default_shard(shard, q)
    _check(q, k, v, log_decay, bonus, shard, causal, initial_state, return_final_state, normalize)
    log_decay = floor_decays("linear_attention", log_decay, compute_dtype(q))
    by_states = causal and shard.sp.linear != "ring_attention"
    only = "" if by_states else "has the causal form by states alone"
    backend = select_backend("linear_attention", backend, q, q.shape[3], v.shape[3], only_torch=only)
    recurrence = select_recurrence(backend, q.device)  # raises ImportError here, before any communication
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if shard.sp.linear in HEAD_PARALLEL:
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
        return run_head_parallel("linear_attention", alone, shard, "linear", tokens, initial_state, parameters)
    if shard.sp.linear == "ring_attention":
        states = {"bonus": bonus, "initial_state": initial_state, "final state": return_final_state or None}
        o, final = left_product(q, k, v, log_decay, shard, causal, normalize, scale, states), None
    else:
        x = Inputs(q, k, v, log_decay, None, bonus)
        parts = initial_state, return_final_state, scale, causal, normalize, shard
        o, final = yield from _by_states(x, recurrence, *parts)
    width = v.shape[-1]
    if normalize:
        o = o[..., :width] / (o[..., width:] + EPSILON)
    o = o.to(q.dtype)
    if final is None:
        return o
    return o, (final[..., :width], final[..., width]) if normalize else final


def _by_states(
    x: Inputs,
    recurrence: type[Recurrence],
    initial_state: State | None,
    final: bool,
    scale: float,
    causal: bool,
    normalize: bool,
    shard: Shard,
) -> Generator[None, None, Output]:
    """Return o, to be rounded, and the final state; with normalize their last column is the normaliser's."""
    wide = compute_dtype(x.q)
    if normalize:
        x = x._replace(v=F.pad(x.v, (0, recurrence.PADDING), value=1.0)[..., : x.v.shape[-1] + 1])
    if not causal:
        return _bidirectional(x.q.to(wide), x.k.to(wide), x.v.to(wide), scale, shard), None
    initial = initial_state if isinstance(initial_state, Tensor) else None
    if isinstance(initial_state, tuple):
        initial = torch.cat([initial_state[0], initial_state[1].unsqueeze(-1)], -1)
    known = None  # log decays of all spans, [n,1,H] or [n,1,1], if every rank knows them
    if x.g is None and (shard.boundaries or x.bonus is not None):
        known = x.v.new_zeros(shard.span_count, 1, 1, dtype=wide)
    elif x.g is not None and x.g.ndim == 1:
        g = x.g.to(wide)
        known = (_lengths(shard.bounds, g.dtype, g.device)[:, None] * g.detach()).unsqueeze(1)
        x = x._replace(g=g.expand(*x.v.shape[:3]))
    if known is not None:
        for span in shard.broken:
            known[span].fill_(float("-inf"))
    return (
        yield from recurrence_steps(
            recurrence,
            x,
            shard,
            scale=scale,
            dtype=wide if normalize else x.q.dtype,
            initial=initial,
            final=final,
            known_decays=known,
        )
    )


def select_recurrence(backend: str, device: torch.device) -> type[Recurrence]:
    """Return the implementation of a backend; ImportError if its package is not installed, or wrong on this device."""
    if backend == "torch":
        return reference.LinearPhases
    with needs(backend):
        from ..kernels.gpu import linear
    check_triton(device)
    return linear.LinearPhases


def _bidirectional(q: Tensor, k: Tensor, v: Tensor, scale: float, shard: Shard) -> Tensor:
    """Run LASP-2, algorithms 1 and 3: every query reads the sum over all spans, and nothing hides the gather."""
    q, k = repeat_heads(q, v.shape[2]), repeat_heads(k, v.shape[2])
    exchange = AllGatherSum(shard)
    with Call(shard, "linear") as call:
        token = start(call, exchange, torch.einsum("bthk,bthv->bhkv", k, v), None)
        total, _ = finish(call, exchange, token)
    return torch.einsum("bthk,bhkv->bthv", q * scale, total)


@functools.lru_cache(maxsize=32)
def _lengths(bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the tokens of each span, cached: each copy from the host would make it wait for the device."""
    return to_device(torch.tensor([b - a for a, b in itertools.pairwise(bounds)], dtype=dtype), device)


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
