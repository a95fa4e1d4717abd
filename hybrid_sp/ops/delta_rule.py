"""The delta rule whose sequence is cut over ranks: DeltaNet, Gated DeltaNet and Kimi Delta Attention.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_(t-1) + beta_t k_t v_t^T          o_t = scale * q_t S_t

The schedule is in `recurrence.py`; here transitions are dense. The arithmetic of a phase is in
`kernels/reference/delta.py`, and by the passes of fla-core in `kernels/gpu/fla_delta.py`. The arithmetic of the
exchange is in `exchange/affine.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Generator

from torch import Tensor

from ..backends import select_backend
from ..baselines.head_parallel import HEAD_PARALLEL, run_head_parallel
from ..checks import (
    compute_dtype,
    default_shard,
    floor_decays,
    operator_in_steps,
    require,
    require_recurrence,
    require_state,
)
from ..kernels.gpu import fla_delta as fla
from ..kernels.phases import Inputs
from ..kernels.reference import delta as reference
from ..shard import Shard
from .recurrence import recurrence_steps


@operator_in_steps
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor | None = None,
    shard: Shard | None = None,
    scale: float | None = None,
    steps: int = 1,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Generator[None, None, Tensor | tuple[Tensor, Tensor]]:
    """Compute the delta rule with any diagonal decay, over the sequence of which `shard` holds this rank's tokens.

    Per head, with a_t = exp(log_decay_t):

        S_t = (I - beta_t k_t k_t^T) diag(a_t) S_(t-1) + beta_t k_t v_t^T          o_t = scale * q_t S_t

    The decayed state holds a value for the token's key. The token replaces the fraction beta of it by its own value.
    The caller normalises k (L2, per head): with |k_t| = 1 and beta in [0, 2] no state grows by itself. With beta over 1
    transitions have negative eigenvalues.

    q, k        [B,T,G,K]; value head h reads key head h // (H // G)
    v           [B,T,H,V], H a multiple of G; q, k and v share a dtype, and o has it
    beta        [B,T,H], any float dtype
    log_decay   natural logs, finite, at most 0: None (DeltaNet) | [B,T,H] (Gated DeltaNet) | [B,T,H,K] (KDA); any float
                dtype. Decays from -1e4 down to the smallest float erase the state, and cost other tokens no accuracy
                (on fla's passes up to 1e-4)
    scale       a number, no tensor (its gradient would be lost); None is K**-0.5
    shard       this rank's part of the sequence (`SequenceParallel.shard`), None for one device
    steps       tokens of q, k, v, beta and log_decay in the place of each token of the shard, one after the other:
                several writes per token, as in DeltaProduct. T, also of o, counts them all
    initial_state       state before the first token of the sequence [B,H,K,V], equal on all ranks. Each rank's gradient
                        is its contribution: their sum is the gradient
    return_final_state  also return the state after the last token, equal on all ranks; backward sums the gradients that
                        the ranks give it. States are fp32 (fp64 for fp64)
    backend     "torch", "fla" (the passes of fla-core), or "auto"

    Returns o [B,T,H,V], or (o, final_state). Communicates one exchange each way (`SequenceParallel.linear`). An
    all-gather sends, per span, row of the batch and head, K*V + K*K numbers forward and K*V backward.

    Raises ValueError for shapes and dtypes that do not fit and for a decay of -inf, before any communication. On CUDA,
    where the host does not look at values, -inf counts as the smallest float.

    Sources: the rule, arXiv 2102.11174, section 4.2; its chunkwise form, arXiv 2406.06484, section 3; decays, arXiv
    2412.06464 ([B,T,H]) and 2510.26692 ([B,T,H,K]); steps, 2502.10297; the exchange,
    LASP-2, arXiv 2502.07563, algorithms 2 and 4.
    """
    require(steps >= 1, "delta_rule", f"steps must be at least 1, got {steps}")
    if shard is not None and steps > 1:
        shard = shard.once(Shard.stretched, steps)
    shard = default_shard(shard, q)
    _check(q, k, v, beta, log_decay, shard, initial_state)
    log_decay = floor_decays("delta_rule", log_decay, compute_dtype(q))
    backend = select_backend("delta_rule", backend, q, q.shape[3], v.shape[3])
    if backend == "fla":
        fla.passes()  # raises ImportError here, before any communication
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if shard.sp.linear in HEAD_PARALLEL:
        alone = functools.partial(delta_rule, scale=scale, return_final_state=return_final_state, backend=backend)
        tokens = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}
        return run_head_parallel("delta_rule", alone, shard, "linear", tokens, initial_state)
    recurrence = fla.DeltaPhases if backend == "fla" else reference.DeltaPhases
    o, S_final = yield from recurrence_steps(
        recurrence,
        Inputs(q, k, v, log_decay, beta),
        shard,
        scale=scale,
        dtype=q.dtype,
        initial=initial_state,
        final=return_final_state,
    )
    return o.to(q.dtype) if S_final is None else (o.to(q.dtype), S_final)


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
    require(
        shard.sp.linear != "ring_attention",
        name,
        'linear="ring_attention" takes linear_attention alone: the delta rule has no left product',
    )
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
