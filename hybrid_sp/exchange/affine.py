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

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import triton_runs_on
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
    first = torch.zeros_like(spans.state[0]) if initial is None else initial
    if in_few_launches(spans.state):
        entering, last = _fold_at_once(spans, first)
        return [*entering, last]
    states = [first]
    for i in range(len(spans.state)):
        states.append(compose(span(spans, i), AffineState(None, states[-1])).state)
    return states


def fold_backward(transitions: Tensor | None, d_entering: Sequence[Tensor], d_final: Tensor | None) -> list[Tensor]:
    """Return the gradients of the states that leave each span, from those of the states that enter them.

    dS_out(n-1) = dS_final;  dS_out(i-1) = A_i^T dS_out(i) + dS_in(i).
    """
    last = torch.zeros_like(d_entering[0]) if d_final is None else d_final
    if in_few_launches(last):
        return [*_fold_at_once(_reversed(transitions, torch.stack(list(d_entering))), last)[0].flip(0)]
    d_leaving = [last]
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
    if transitions is not None and in_few_launches(d_state):
        d_all = d_state.new_zeros(len(transitions), *d_state.shape)
        for i, d in d_own.items():
            d_all[i] = d
        return _fold_at_once(_reversed(transitions, d_all), d_state)[1]
    for i in reversed(range(max(own) + 1 if transitions is None else len(transitions))):
        d_state = apply_adjoint(None if transitions is None else transitions[i], d_state)
        if i in d_own:
            d_state = d_state + d_own[i]
    return d_state


def in_few_launches(state: Tensor) -> bool:
    """Tell whether a fold is to take few launches: on a GPU, where one after another costs more than the arithmetic."""
    return state.is_cuda


def _reversed(transitions: Tensor | None, states: Tensor) -> AffineState:
    """Return the maps of the backward scan, x -> A^T x + dS_in, from the last span to the first."""
    if transitions is not None:
        transitions = (transitions.mT if transitions.ndim == states.ndim else transitions).flip(0)
    return AffineState(transitions, states.flip(0))


def _fold_at_once(spans: AffineState, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return the results of `fold_forward`, the first n stacked, in a number of launches that hardly grows with n.

    fp32 states with diagonal transitions go through our fold kernel, in one launch. Other spans are cut into about
    sqrt(n) groups. The maps of all groups are composed at the same time, and then the groups follow each other.
    """
    (A, B), n = spans, len(spans.state)
    if B.dtype == torch.float32 and (A is None or A.ndim < B.ndim) and triton_runs_on(B.device):
        from ..kernels.gpu.state_passing import chain

        return chain(B, A, first)
    # 1. Cut the spans into groups. Maps that change nothing, x -> x + 0, fill the last one.
    size = math.isqrt(n - 1) + 1
    if (missing := -n % size) > 0:
        B = torch.cat([B, B.new_zeros(missing, *B.shape[1:])])
        if A is not None:
            same = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) if A.ndim == B.ndim else A.new_zeros(())
            A = torch.cat([A, same.expand(missing, *A.shape[1:])])
    cut = AffineState(None if A is None else _by_place(A, size), _by_place(B, size))
    # 2. Compose the maps of every group, from its first span on.
    through = [span(cut, 0)]
    for j in range(1, size):
        through.append(compose(span(cut, j), through[-1]))
    # 3. Fold the groups one after the other into the states that enter them.
    entering = [first]
    for i in range(len(through[0].state) - 1):
        entering.append(compose(span(through[-1], i), AffineState(None, entering[-1])).state)
    # 4. Apply the maps of step 2 to these.
    enters = AffineState(None, torch.stack(entering))
    leaving = torch.stack([compose(maps, enters).state for maps in through], 1).flatten(0, 1)
    return torch.cat([first.unsqueeze(0), leaving[: n - 1]]), leaving[n - 1]


def _by_place(x: Tensor, size: int) -> Tensor:
    """Cut x [n, ...] into groups of `size`, and stack the first of each, the second of each, and so on."""
    return x.unflatten(0, (-1, size)).transpose(0, 1)


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
