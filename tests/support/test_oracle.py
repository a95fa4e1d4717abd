"""The oracle against closed forms, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.oracle import (
    ROUNDING,
    assert_close,
    delta_rule_loop,
    linear_attention_loop,
    norm,
    relative,
    softmax_attention_loop,
)

B, T, G, H, K, V = 2, 13, 2, 4, 3, 5


def inputs(dtype: torch.dtype = torch.float64, heads: int = G) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (B, T, heads, K), (B, T, heads, K), (B, T, H, V)
    q, k, v = (torch.randn(size, dtype=dtype) for size in sizes)
    return q, k, v


def decays(dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    sizes = {"H": (H,), "BTH": (B, T, H), "BTHK": (B, T, H, K)}
    return {"none": None} | {name: F.logsigmoid(torch.randn(size, dtype=dtype)) for name, size in sizes.items()}


@pytest.mark.parametrize("name", ["none", "H", "BTH", "BTHK"])
def test_linear_loop_is_the_dense_sum(name: str) -> None:
    """o_i = scale * sum over j <= i of (q_i exp(c_i - c_j) . k_j) v_j + scale * q_i exp(c_i) S_0; c sums the decays."""
    q, k, v = inputs()
    log_decay = decays()[name]
    S_0 = torch.randn(B, H, K, V, dtype=torch.float64)
    o, S = linear_attention_loop(q, k, v, log_decay, scale=0.7, initial_state=S_0)

    steps = torch.zeros(B, T, H, K, dtype=torch.float64)
    if log_decay is not None:
        steps = steps + (log_decay[:, None] if name == "H" else log_decay[..., None] if name == "BTH" else log_decay)
    c = steps.cumsum(1)
    key_head = torch.tensor([h // (H // G) for h in range(H)])
    q, k = q[:, :, key_head], k[:, :, key_head]
    weights = torch.einsum("bihk,bijhk,bjhk->bijh", q, (c[:, :, None] - c[:, None]).exp(), k)
    weights = weights * torch.ones(T, T, dtype=torch.float64).tril()[None, :, :, None]
    want = torch.einsum("bijh,bjhv->bihv", weights, v) + torch.einsum("bihk,bhkv->bihv", q * c.exp(), S_0)
    want_S = c[:, -1, :, :, None].exp() * S_0 + torch.einsum("bjhk,bjhv->bhkv", (c[:, -1:] - c).exp() * k, v)
    assert_close("o", o, 0.7 * want, 1e-13)
    assert_close("S", S, want_S, 1e-13)


def test_normalizer_and_bidirectional() -> None:
    q, k, v = (x.abs() for x in inputs(heads=H))
    z_0 = torch.rand(B, H, K, dtype=torch.float64)
    S_0 = torch.rand(B, H, K, V, dtype=torch.float64)
    o, (S, z) = linear_attention_loop(q, k, v, normalize=True, initial_state=(S_0, z_0))
    ones = torch.ones(B, T, H, 1, dtype=torch.float64)
    plain, _ = linear_attention_loop(q, k, torch.cat([v, ones], -1), initial_state=torch.cat([S_0, z_0[..., None]], -1))
    assert_close("o", o, plain[..., :-1] / (plain[..., -1:] + 1e-10), 1e-13)
    assert_close("z", z, z_0 + k.sum(1), 1e-13)

    both, _ = linear_attention_loop(q, k, v, causal=False)
    S_all = torch.einsum("bthk,bthv->bhkv", k, v)
    assert_close("bidirectional", both, K**-0.5 * torch.einsum("bthk,bhkv->bthv", q, S_all), 1e-13)


@pytest.mark.parametrize("name", ["none", "BTH", "BTHK"])
def test_delta_loop_is_the_sum_over_products_of_matrices(name: str) -> None:
    """o_i = scale * q_i (P(0, i) S_0 + sum over j <= i of P(j, i) beta_j k_j v_j^T), with P(j, i) the product of
    (I - beta_t k_t k_t^T) diag(a_t) over j < t <= i (over t <= i for S_0), the latest token leftmost."""
    q, k, v = inputs()
    log_decay, beta = decays()[name], torch.rand(B, T, H, dtype=torch.float64)
    S_0 = torch.randn(B, H, K, V, dtype=torch.float64)
    o, S = delta_rule_loop(q, k, v, beta, log_decay, scale=0.7, initial_state=S_0)

    a = torch.ones(B, T, H, K, dtype=torch.float64)
    if log_decay is not None:
        a = a * (log_decay[..., None] if name == "BTH" else log_decay).exp()
    k = k[:, :, [h // (H // G) for h in range(H)]]
    outer = beta[..., None, None] * torch.einsum("bthk,bthl->bthkl", k, k)
    steps = (torch.eye(K, dtype=torch.float64) - outer) * a[..., None, :]
    for i in range(T):
        want, after = torch.zeros_like(S_0), torch.eye(K, dtype=torch.float64).expand(B, H, K, K)
        for j in range(i, -1, -1):
            want = want + after @ torch.einsum("bh,bhk,bhv->bhkv", beta[:, j], k[:, j], v[:, j])
            after = after @ steps[:, j]
        want = want + after @ S_0
        q_i = q[:, i].repeat_interleave(H // G, 1)
        assert_close(f"o at {i}", o[:, i], 0.7 * torch.einsum("bhk,bhkv->bhv", q_i, want), 1e-13)
    assert_close("S", S, want, 1e-13)


@pytest.mark.parametrize("causal", [True, False])
def test_softmax_loop_is_torch_sdpa(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, K, dtype=torch.float64) for heads in (H, G, G))
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True)
    assert_close("o", softmax_attention_loop(q, k, v, causal=causal), want.transpose(1, 2), 1e-13)


def test_assert_close_says_what_and_where() -> None:
    want = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(AssertionError, match=r"dq on rank 2: relative error 0.18.*worst at \(1, 0\): got 2, want 3"):
        assert_close("dq on rank 2", torch.tensor([[1.0, 2.0], [2.0, 4.0]]), want, 1e-6)
    with pytest.raises(AssertionError, match=r"worst at \(0, 1\): got nan"):
        assert_close("o", torch.tensor([[1.0, float("nan")], [3.0, 4.0]]), want, 1e-6)
    with pytest.raises(AssertionError, match="got None, want"):
        assert_close("dk", None, want, 1e-6)
    with pytest.raises(AssertionError, match="shapes|got torch"):
        assert_close("o", want[0], want, 1e-6)
    assert relative(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative(torch.full((2,), 1e-30), torch.zeros(2)) == float("inf")


def quotients(fixed_denominator: bool) -> dict[str, Tensor]:
    """dq, dk and dv of tokens that see themselves alone, by softmax and by a normaliser."""
    found = {}
    for name, positive in (("softmax", False), ("normaliser", True)):
        leaves = [(x.abs() if positive else x)[:, :1].detach().requires_grad_() for x in inputs(heads=H)]
        if positive:
            o = linear_attention_loop(*leaves, normalize=True, fixed_denominator=fixed_denominator)[0]
        else:
            o = softmax_attention_loop(*leaves, fixed_denominator=fixed_denominator)
        grads = torch.autograd.grad((o * torch.arange(1.0, V + 1)).sum(), leaves)
        found |= {f"{name} d{x}": grad for x, grad in zip("qkv", grads, strict=True)}
    return found


def test_terms_are_what_cancels_in_a_quotient() -> None:
    want, terms = quotients(False), quotients(True)
    for name in want:
        if name.endswith("v"):
            assert torch.equal(want[name], terms[name])
        else:  # the normaliser's 1e-10 keeps a ten-thousand-millionth
            assert norm(want[name]) < 1e-8 * norm(terms[name]), name


def test_only_rounding_of_what_cancels_is_allowed() -> None:
    want, terms = torch.zeros(3, dtype=torch.float64), torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    off = torch.tensor([0.0, 2.9 * ROUNDING, 0.0], dtype=torch.float64)
    assert_close("dq", off, want, 1e-10, lambda: terms)
    for got, given in ((off, None), (off, lambda: 0 * terms), (2 * off, lambda: terms), (0 * off / 0, lambda: terms)):
        with pytest.raises(AssertionError, match="dq: relative error (inf|nan) is over 1e-10"):
            assert_close("dq", got, want, 1e-10, given)
