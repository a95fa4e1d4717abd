"""The truth that the tests hold the engine against: one token after another, as the equations are written.

    S_t = a_t S_(t-1) + k_t v_t^T        o_t = scale * q_t S_t        (a_t scalar per head, or a vector over K)
                                         o_t = scale * q_t (S_(t-1) + diag(u) k_t v_t^T)     with a bonus u

Plain torch in the dtype of q (float64 in tests), differentiable by autograd, no code shared with the engine.

Zero by structure and zero by cancellation differ. Where a mask or a missing path makes the truth zero, what is tested
must be zero exactly. Where terms cancel, a library that sums in another order leaves rounding: there the error is
measured against the size of the terms. Here that is the quotient rule, d(x/y) = dx/y - x dy/y^2: under softmax or a
normaliser, a token that sees itself alone has the same gradient twice. The terms are the gradient with y held fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NORMALIZER_EPS = 1e-10
ROUNDING = 1e-13  # of the terms of a float64 sum, which may cancel: a few hundred roundings

LinearState = Tensor | tuple[Tensor, Tensor]


def linear_attention_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    normalize: bool = False,
    initial_state: LinearState | None = None,
    bonus: Tensor | None = None,
    fixed_denominator: bool = False,
) -> tuple[Tensor, LinearState]:
    """o [B,T,H,V] and the final state, S [B,H,K,V] or (S, z [B,H,K]) with normalize.

    q, k [B,T,G,K] (value head h reads key head h // (H // G)); v [B,T,H,V]; log_decay None, [H], [B,T,H] or [B,T,H,K].
    With normalize z_t = a_t z_(t-1) + k_t and o_t is divided by scale * q_t z_t + 1e-10. Not causal: every token reads
    the sum over all tokens; decay and initial state do not exist then. A bonus [H,K] reads the state before the token.
    With a fixed denominator gradients do not pass through it: they are the terms that may cancel.
    """
    if not causal and (log_decay is not None or initial_state is not None):
        raise ValueError("the bidirectional form has no decay and no initial state")
    B, T, H, V = v.shape
    G, K = q.shape[2:]
    q = (q * (K**-0.5 if scale is None else scale)).repeat_interleave(H // G, dim=2)
    k = k.repeat_interleave(H // G, dim=2)
    decay = torch.ones_like(k) if log_decay is None else decay_of_every_token(log_decay.to(k.dtype), k)

    S, z = q.new_zeros(B, H, K, V), q.new_zeros(B, H, K)
    if initial_state is not None:
        S, z = initial_state if isinstance(initial_state, tuple) else (initial_state, z)
        if isinstance(initial_state, tuple) != normalize:
            raise ValueError("the initial state is (S, z) with normalize, and S without")
    states = []
    for k_t, v_t, a_t in zip(k.unbind(1), v.unbind(1), decay.unbind(1), strict=True):
        kv = k_t[..., None] * v_t[..., None, :]
        before = None if bonus is None else (S + bonus[:, :, None] * kv, z + bonus * k_t)
        S = a_t[..., None] * S + kv
        z = a_t * z + k_t
        states.append((S, z) if before is None else before)
    outputs = []
    for q_t, (S_read, z_read) in zip(q.unbind(1), states if causal else states[-1:] * T, strict=True):
        o = torch.einsum("bhk,bhkv->bhv", q_t, S_read)
        if normalize:
            denominator = torch.einsum("bhk,bhk->bh", q_t, z_read)[..., None] + NORMALIZER_EPS
            o = o / (denominator.detach() if fixed_denominator else denominator)
        outputs.append(o)
    return torch.stack(outputs, dim=1), (S, z) if normalize else S


def decay_of_every_token(log_decay: Tensor, k: Tensor) -> Tensor:
    """exp(log_decay), written out as [B,T,H,K]."""
    missing_dims = {1: log_decay[None, None, :, None], 3: log_decay[..., None], 4: log_decay}
    return missing_dims[log_decay.dim()].exp().expand_as(k)


def delta_rule_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B,T,H,V] and the final state S [B,H,K,V] of S_t = (I - b_t k_t k_t^T) a_t S_(t-1) + b_t k_t v_t^T.

    q, k [B,T,G,K] (value head h reads key head h // (H // G)); v [B,T,H,V]; beta [B,T,H]; log_decay None, [B,T,H] or
    [B,T,H,K]. The caller normalises k.
    """
    B, T, H, V = v.shape
    G, K = q.shape[2:]
    q = (q * (K**-0.5 if scale is None else scale)).repeat_interleave(H // G, dim=2)
    k = k.repeat_interleave(H // G, dim=2)
    decay = torch.ones_like(k) if log_decay is None else decay_of_every_token(log_decay.to(k.dtype), k)
    S = q.new_zeros(B, H, K, V) if initial_state is None else initial_state
    outputs = []
    for q_t, k_t, v_t, b_t, a_t in zip(*(x.unbind(1) for x in (q, k, v, beta, decay)), strict=True):
        S = a_t[..., None] * S
        held = torch.einsum("bhk,bhkv->bhv", k_t, S)  # what the state has under this key
        new = b_t[..., None] * (v_t - held)
        S = S + k_t[..., None] * new[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, S))
    return torch.stack(outputs, dim=1), S


def softmax_attention_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    fixed_denominator: bool = False,
) -> Tensor:
    """softmax(scale * q k^T) v as dense math. q [B,T,Hq,D]; k, v [B,T,Hkv,D]; query head h reads h // (Hq // Hkv).
    With a window a token sees itself and the window - 1 tokens before it. Sinks [Hq] are scores of keys without a
    value. With a fixed denominator gradients do not pass through it: they are the terms that may cancel."""
    T, heads, D = q.shape[1:]
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    v = v.repeat_interleave(heads // v.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)
    if causal:
        later = torch.ones(T, k.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    if window is not None:
        gone = torch.ones(T, T, dtype=torch.bool).tril(-window)
        scores = scores.masked_fill(gone, float("-inf"))
    log_denominator = scores.logsumexp(dim=-1, keepdim=True)
    if sinks is not None:
        log_denominator = torch.logaddexp(log_denominator, sinks[:, None, None])
    weights = (scores - (log_denominator.detach() if fixed_denominator else log_denominator)).exp()
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def short_conv_loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = sum over j < W of weight[:, W-1-j] x_(t-j) + bias, and the last W-1 inputs. x [B,T,D], weight [D,W]."""
    width = weight.shape[1]
    inputs = [x.new_zeros(x.shape[0], x.shape[2])] * (width - 1)
    if initial_state is not None:
        inputs = list(initial_state.unbind(1))
    outputs = []
    taps = weight.unbind(1)
    for x_t in x.unbind(1):
        inputs.append(x_t)
        y = sum(taps[width - 1 - j] * inputs[-1 - j] for j in range(width))
        y = y if bias is None else y + bias
        outputs.append(y / (1 + torch.exp(-y)) if silu else y)
    return torch.stack(outputs, 1), torch.stack(inputs[len(inputs) - width + 1 :], 1) if width > 1 else x[:, :0]


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| over the whole tensor, in float64; where want is all zero, 0.0 or infinity."""
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: got {tuple(got.shape)}, want {tuple(want.shape)}")
    difference, size = norm(got.detach().double() - want.detach().double()), norm(want)
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.detach().double()).item()


def assert_close(
    name: str, got: Tensor | None, want: Tensor | None, bound: float, terms: Callable[[], Tensor] | None = None
) -> None:
    """|got - want| <= bound * |want|, for one tensor; name says which, on which rank, in which case.

    `terms` gives what may cancel in want, of which ROUNDING is allowed besides; it is called only if it is needed.
    """
    if got is None or want is None:
        assert got is want, f"{name}: got {describe(got)}, want {describe(want)}"
        return
    assert got.shape == want.shape, f"{name}: got {describe(got)}, want {describe(want)}"
    error = relative(got, want)
    if error <= bound:  # NaN is not
        return
    difference = (got.detach().double() - want.detach().double()).abs()
    size = norm(terms()) if terms is not None else 0.0
    if norm(difference) <= bound * norm(want) + ROUNDING * size:
        return
    worst = difference.nan_to_num(float("inf")).flatten().argmax().item() if got.numel() else 0
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
    cancelling = f", of terms of size {size:.3g}" if size else ""
    raise AssertionError(
        f"{name}: relative error {error:.3g} is over {bound:g}{cancelling}; worst at {index}: "
        f"got {got[index].item():.6g}, want {want[index].item():.6g}"
    )


def describe(x: Tensor | None) -> str:
    return "None" if x is None else f"{x.dtype} {tuple(x.shape)}"
