"""The left product by tiles against the whole matrix D, forward and backward, and its decays beside a huge one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hybrid_sp.baselines import left_product
from tests.support.oracle import assert_close


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_product, "QUERIES", 4)
    monkeypatch.setattr(left_product, "KEYS", 6)


def normal(*shape: int) -> Iterator[Tensor]:
    make = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(*shape, generator=make, dtype=torch.float64)


def decay_matrix(g: Tensor) -> Tensor:
    """exp of the sum of g over (s, t], pair by pair; 0 for s > t."""
    D = g.new_zeros(*g.shape, g.shape[-1])
    for t in range(g.shape[-1]):
        for s in range(t + 1):
            D[..., t, s] = g[..., s + 1 : t + 1].sum(-1).exp()
    return D


@pytest.mark.parametrize("tokens", [1, 4, 15])
def test_a_run_over_itself(tokens: int) -> None:
    rows = normal(2, 3, tokens, 5)
    q, k, v, do = (next(rows).requires_grad_() for _ in range(4))
    g = -next(normal(2, 3, tokens)).abs()
    g[0, 0, tokens // 2] = -1e4  # the tokens beside it lose nothing
    g.requires_grad_()
    want = (q @ k.mT * decay_matrix(g)) @ v
    expected = torch.autograd.grad(want, (q, k, v, g), do.detach())
    with torch.no_grad():
        o = torch.zeros_like(v)
        left_product.causal_forward(o, q, k, v, g)
        grads = tuple(torch.zeros_like(x) for x in (q, k, v))
        dg = left_product.causal_backward(grads, do, q, k, v, g)
    assert_close("o", o, want, 1e-13)
    for name, got, grad in zip("qkvg", (*grads, dg), expected, strict=True):
        assert_close(f"d{name}", got, grad, 1e-13)


def test_a_run_over_another() -> None:
    rows, keys = normal(1, 2, 9, 3), normal(1, 2, 14, 3)
    q, do, k, v = (next(x).requires_grad_() for x in (rows, rows, keys, keys))
    read, written = ((-next(normal(1, 2, n)).abs()).requires_grad_() for n in (9, 14))
    want = (q @ k.mT * (read[..., :, None] + written[..., None, :]).exp()) @ v
    expected = torch.autograd.grad(want, (q, k, v, read, written), do.detach())
    with torch.no_grad():
        o = torch.zeros_like(q)
        left_product.full_forward(o, q, k, v, read, written)
        grads = tuple(torch.zeros_like(x) for x in (q, k, v))
        d_sides = left_product.full_backward(grads, do, q, k, v, read, written)
    assert_close("o", o, want, 1e-13)
    for name, got, grad in zip(("dq", "dk", "dv", "d_read", "d_written"), (*grads, *d_sides), expected, strict=True):
        assert_close(name, got, grad, 1e-13)


def test_sums_of_decays_and_their_adjoints() -> None:
    g, d = next(normal(1, 2, 6)).requires_grad_(), next(normal(1, 2, 6))
    for forward, backward, run in (
        (left_product.through, left_product.through_backward, lambda t: slice(0, t + 1)),
        (left_product.after, left_product.after_backward, lambda t: slice(t + 1, 6)),
    ):
        want = torch.stack([g[..., run(t)].sum(-1) for t in range(6)], -1)
        assert_close(forward.__name__, forward(g), want, 1e-14)
        assert_close(backward.__name__, backward(d), torch.autograd.grad(want, g, d)[0], 1e-14)
