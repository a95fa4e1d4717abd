"""The algebra of affine states: the effect of a run of tokens on a linear layer's state, and its adjoint.

A run of tokens maps the state that enters it to the one that leaves it,

    S_out = A S_in + B,

so it is the pair `AffineState(transition A, state B)`. The size of the pair does not depend on the number of tokens.

For a state [..., H, K, V], a diagonal A is kept as a log decay a, with -inf where nothing passes:

    None            A = I
    [..., H]        A = exp(a)
    [..., H, K]     A = diag(exp(a))

A transition with as many dims as the state is a dense A [..., H, K, K], as in the delta rule. Spans are stacked in a
leading dim, in sequence order. No communication happens here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.phases import AffineState


def apply(transition: Tensor | None, state: Tensor) -> Tensor:
    """Return A S."""
    if transition is None:
        return state
    if transition.ndim == state.ndim:
        return transition @ state
    return transition.exp().reshape(transition.shape + (1,) * (state.ndim - transition.ndim)) * state


def apply_adjoint(transition: Tensor | None, state: Tensor) -> Tensor:
    """Return A^T S."""
    if transition is not None and transition.ndim == state.ndim:
        transition = transition.mT
    return apply(transition, state)


def compose(later: AffineState, earlier: AffineState) -> AffineState:
    """Compose the run of `earlier` and then `later`: (A2 A1, A2 B1 + B2)."""
    transition = None
    if earlier.transition is not None and later.transition is not None:
        dense = later.transition.ndim == later.state.ndim
        transition = apply(later.transition, earlier.transition) if dense else later.transition + earlier.transition
    return AffineState(transition, apply(later.transition, earlier.state) + later.state)


def span(spans: AffineState, i: int) -> AffineState:
    """Return the i-th of stacked spans."""
    return AffineState(None if spans.transition is None else spans.transition[i], spans.state[i])


def fold_forward(spans: AffineState, initial: Tensor | None) -> list[Tensor]:
    """Return the n states that enter n stacked spans, then the one that leaves the last: n + 1 of [..., H, K, V].

    S_in(0) = S_0;  S_in(i+1) = A_i S_in(i) + B_i.
    """
    states = [torch.zeros_like(spans.state[0]) if initial is None else initial]
    for i in range(len(spans.state)):
        states.append(compose(span(spans, i), AffineState(None, states[-1])).state)
    return states


def fold_backward(transitions: Tensor | None, d_entering: Sequence[Tensor], d_final: Tensor | None) -> list[Tensor]:
    """Return the gradients of the states that leave each span, from those of the states that enter them.

    dS_out(n-1) = dS_final;  dS_out(i-1) = A_i^T dS_out(i) + dS_in(i).
    """
    d_leaving = [torch.zeros_like(d_entering[0]) if d_final is None else d_final]
    for i in range(len(d_entering) - 1, 0, -1):
        d_leaving.append(apply_adjoint(None if transitions is None else transitions[i], d_leaving[-1]) + d_entering[i])
    return d_leaving[::-1]


def fold_initial(
    transitions: Tensor | None, own: Sequence[int], d_entering: Sequence[Tensor], d_final: Tensor | None
) -> Tensor:
    """Return this rank's part of dS_0.

    It is the sum over this rank's spans of (A_0^T ... A_(i-1)^T) dS_in(i), plus (A_0^T ... A_(n-1)^T) dS_final.
    """
    d_own = dict(zip(own, d_entering, strict=True))
    d_state = torch.zeros_like(d_entering[0]) if d_final is None else d_final
    for i in reversed(range(max(own) + 1 if transitions is None else len(transitions))):
        d_state = apply_adjoint(None if transitions is None else transitions[i], d_state)
        if i in d_own:
            d_state = d_state + d_own[i]
    return d_state


def packed(summary: AffineState) -> Tensor:
    """Pack state and transition into one row of numbers per head, to be sent: [..., H, K*V + the transition's]."""
    rows = summary.state.flatten(-2)
    if summary.transition is None:
        return rows
    return torch.cat([rows, summary.transition.reshape(*rows.shape[:-1], -1)], -1)


def unpacked(rows: Tensor, like: AffineState) -> AffineState:
    """Undo `packed`; `like` has the shapes of the result, from the heads on."""
    heads, shape = like.state.ndim - 2, like.state.shape[-2:]
    states = rows[..., : shape.numel()].unflatten(-1, shape)
    if like.transition is None:
        return AffineState(None, states)
    numbers = rows[..., shape.numel() :]
    return AffineState(numbers.reshape(*rows.shape[:-1], *like.transition.shape[heads:]), states)
