"""The algebra of affine states against dense matrices, and the backward fold against autograd of the forward one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_sp.exchange import affine
from hybrid_sp.exchange.affine import AffineState, compose, fold_backward, fold_forward, fold_initial, span
from tests.support.interpreter import mend
from tests.support.oracle import assert_close

N, B, H, K, V = 5, 2, 3, 4, 6
SHAPES = {"none": None, "known": (1, 1), "scalar": (B, H), "vector": (B, H, K), "dense": (B, H, K, K)}


def make(kind: str, count: int = N) -> AffineState:
    torch.manual_seed(1)
    shape = SHAPES[kind]
    transition = None if shape is None else -torch.rand(count, *shape, dtype=torch.float64)
    if transition is not None and count > 2:  # nothing passes the third span
        transition[2] = 0.0 if kind == "dense" else float("-inf")
    return AffineState(transition, torch.randn(count, B, H, K, V, dtype=torch.float64))


def matrix(transition: Tensor | None) -> Tensor:
    """A as [..., K, K]."""
    if transition is None:
        return torch.eye(K, dtype=torch.float64).expand(B, H, K, K)
    if transition.ndim == 4:
        return transition
    return torch.diag_embed((transition if transition.ndim == 3 else transition[..., None]).exp().expand(B, H, K))


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


FORMS = {"groups": (torch.float64, 1e-13), "kernel": (torch.float32, 1e-6)}  # in few launches: dtype and bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SHAPES)
def test_folds_in_few_launches_are_the_folds_span_by_span(
    monkeypatch: pytest.MonkeyPatch, kind: str, form: str
) -> None:
    dtype, bound = FORMS[form]
    if form == "kernel":
        pytest.importorskip("triton")
        mend()
    for count in (1, 2, 3, 4, 5, 7, 9, 12):
        exact, d_entering = make(kind, count), torch.randn(count, B, H, K, V, dtype=torch.float64)
        S_0, d_final = torch.randn(2, B, H, K, V, dtype=torch.float64)
        own = (0, count - 1) if count > 1 else (0,)

        def folds(dtype: torch.dtype, first: Tensor | None, last: Tensor | None) -> dict[str, Tensor]:
            A, states, d, first, last = (  # noqa: B023
                None if x is None else x.to(dtype)
                for x in (*exact, d_entering, first, last)  # noqa: B023
            )
            assert states is not None and d is not None
            return {
                "states": torch.stack(fold_forward(AffineState(A, states), first)),
                "gradients": torch.stack(fold_backward(A, list(d), last)),
                "dS_0": fold_initial(A, own, [d[i] for i in own], last),  # noqa: B023
            }

        for first, last in ((S_0, d_final), (None, None)):
            want = folds(torch.float64, first, last)
            with monkeypatch.context() as patch:
                patch.setattr(affine, "in_few_launches", lambda state: True)
                got = folds(dtype, first, last)
            for name, value in got.items():
                assert_close(f"{name}, {count} spans", value.double(), want[name], bound)


def test_launches_grow_as_the_root_of_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 dense transitions take 43 launches of products, instead of 127; diagonal ones take one of a kernel."""
    monkeypatch.setattr(affine, "in_few_launches", lambda state: True)
    made = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            made += func is torch.ops.aten.bmm.default
            return func(*args, **(kwargs or {}))

    spans = make("dense", 128)
    with Count():
        fold_forward(spans, None)
    assert made == 2 * 11 + 10 + 12
    pytest.importorskip("triton")
    from hybrid_sp.kernels.gpu import state_passing

    launched: list[Any] = []
    monkeypatch.setattr(state_passing, "launch", lambda kernel, *_, **__: launched.append(kernel))
    for kind in ("none", "known", "scalar", "vector"):
        A, state = make(kind, 128)
        fold_forward(AffineState(None if A is None else A.float(), state.float()), None)
        assert launched == [state_passing.fold_kernel]
        launched.clear()
