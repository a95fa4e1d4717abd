"""The algebra of affine states against dense matrices, and the backward fold against autograd of the forward one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_sp.exchange.affine import AffineState, compose, fold_backward, fold_forward, fold_initial, span
from tests.support.oracle import assert_close

N, B, H, K, V = 5, 2, 3, 4, 6
SHAPES = {"none": None, "scalar": (N, B, H), "vector": (N, B, H, K), "dense": (N, B, H, K, K)}


def make(kind: str) -> AffineState:
    torch.manual_seed(1)
    shape = SHAPES[kind]
    transition = None if shape is None else -torch.rand(shape, dtype=torch.float64)
    if transition is not None:  # nothing passes the third span
        transition[2] = 0.0 if kind == "dense" else float("-inf")
    return AffineState(transition, torch.randn(N, B, H, K, V, dtype=torch.float64))


def matrix(transition: Tensor | None) -> Tensor:
    """A as [..., K, K]."""
    if transition is None:
        return torch.eye(K, dtype=torch.float64).expand(B, H, K, K)
    if transition.ndim == 4:
        return transition
    return torch.diag_embed(transition.exp() if transition.ndim == 3 else transition.exp()[..., None].expand(B, H, K))


@pytest.mark.parametrize("kind", SHAPES)
def test_forward_fold_is_the_product_of_matrices(kind: str) -> None:
    spans = make(kind)
    S = S_0 = torch.randn(B, H, K, V, dtype=torch.float64)
    states = fold_forward(spans, S_0)
    whole = span(spans, 0)
    for i in range(N):
        assert_close(f"S_in({i})", states[i], S, 1e-14)
        one = span(spans, i)
        S = matrix(one.transition) @ S + one.state
        whole = compose(one, whole) if i else whole
    assert_close("S_final", states[N], S, 1e-14)
    assert_close("composed", matrix(whole.transition) @ S_0 + whole.state, S, 1e-13)
    two = compose(span(spans, 1), span(spans, 0))
    assert_close("two composed", matrix(two.transition) @ S_0 + two.state, states[2], 1e-13)


@pytest.mark.parametrize("kind", SHAPES)
def test_compose_is_associative(kind: str) -> None:
    a, b, c = (span(make(kind), i) for i in (0, 1, 3))
    left, right = compose(compose(c, b), a), compose(c, compose(b, a))
    assert_close("state", left.state, right.state, 1e-14)
    assert_close("transition", left.transition, right.transition, 1e-14)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("final", [True, False])
def test_backward_fold_is_the_adjoint(kind: str, final: bool) -> None:
    spans = make(kind)
    leaves = [x.requires_grad_() for x in spans if x is not None]
    S_0 = torch.randn(B, H, K, V, dtype=torch.float64, requires_grad=True)
    states = fold_forward(spans, S_0)
    d_entering = torch.randn(N, B, H, K, V, dtype=torch.float64)
    d_final = torch.randn(B, H, K, V, dtype=torch.float64) if final else None
    outputs, given = states[:N], list(d_entering)
    if d_final is not None:
        outputs, given = states, [*given, d_final]
    want = torch.autograd.grad(outputs, [*leaves, S_0], given)

    transitions = None if spans.transition is None else spans.transition.detach()
    d_leaving = torch.stack(fold_backward(transitions, list(d_entering), d_final))
    assert_close("dB", d_leaving, want[-2], 1e-13)
    parts = [fold_initial(transitions, [i], [d_entering[i]], d_final if i == 2 else None) for i in range(N)]
    assert_close("dS_0, summed over ranks", torch.stack(parts).sum(0), want[-1], 1e-13)
