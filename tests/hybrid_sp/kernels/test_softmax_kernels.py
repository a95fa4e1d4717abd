"""The kernels of softmax attention on one device. No GPU is needed: what is called on CUDA is bound to torch's schemas,
run on fake CUDA tensors, and stood in for on the CPU by the formula with the conventions that torch's sources show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_sp.kernels.softmax import aten, attend, formula, layout
from hybrid_sp.kernels.softmax.attend import Kernel, merge, select_kernel
from tests.support.oracle import assert_close

SCALE = 0.3
NAMES = ["o", "lse", "dq", "dk", "dv", "dk_others", "dv_others"]


def leaves(tokens: int, others: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q of 4 heads, then k and v of 2 heads of as many tokens, then k and v of other tokens."""
    make = torch.Generator().manual_seed(3)
    lengths, heads = [tokens, tokens, tokens, others, others], [4, 2, 2, 2, 2]
    shapes = [(2, length, count, dim) for length, count in zip(lengths, heads, strict=True)]
    return [torch.randn(shape, generator=make, dtype=torch.float64).to(dtype) for shape in shapes]


def truth(x: list[Tensor], do: Tensor) -> list[Tensor]:
    """o, lse and the gradients of causal attention to the own keys after all the others, by autograd."""
    q, k, v, k_others, v_others = x = [y.double().requires_grad_() for y in x]
    k, v = (torch.cat(pair, 1).repeat_interleave(2, 2) for pair in ((k_others, k), (v_others, v)))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * SCALE
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1 + k_others.shape[1])
    scores = scores.masked_fill(hidden, float("-inf"))
    o = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    return [o, scores.logsumexp(-1).transpose(1, 2), *torch.autograd.grad(o, x, do.double())]


def in_two_blocks(kernel: Kernel, x: list[Tensor], do: Tensor) -> list[Tensor]:
    """The same from two blocks: each is given the output and lse of the whole in backward, some heads of more."""
    q, k, v, k_others, v_others = x
    own, others = (q, k, v, True), (q, k_others, v_others, False)
    o, lse = merge(*kernel.forward(*own, SCALE), *kernel.forward(*others, SCALE))
    o = torch.cat([o, o], 2).to(q.dtype)[:, :, : q.shape[2]]
    lse = torch.cat([lse, lse], 2).contiguous()[:, :, : q.shape[2]]
    found = [kernel.backward(do, *block[:3], o, lse, block[3], SCALE) for block in (own, others)]
    return [o, lse, found[0][0] + found[1][0], *found[0][1:], *found[1][1:]]


def compare(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for name, got, want in zip(NAMES, found, wanted, strict=True):
        assert_close(name, got.double(), want, bound)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o and lse of q [B,H,T,D], k and v [B,G,S,D]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups = k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    P = ((q @ k.mT * scale).masked_fill(~seen, float("-inf")) - lse.unsqueeze(-1)).exp()
    dS = P * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dS.mT @ q, P.mT @ do))
    return dS @ k, dk, dv


class CudaOperators:
    """torch's CUDA operators, on the CPU: arguments are bound to the installed schema, checked as their sources check
    them, and read as their kernels read them."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        schema = getattr(torch.ops.aten, name).default._schema

        def call(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            left_out = [a.name for a in schema.arguments if a.name not in given and not a.has_default_value()]
            assert not left_out and len(given) == len(args) + len(kwargs)
            self.called.append(name)
            result = getattr(type(self), name.removeprefix("_scaled_dot_product_"))(SimpleNamespace(**given))
            assert len(result) == len(schema.returns)
            return result

        return call

    @staticmethod
    def flash_attention(x: SimpleNamespace) -> tuple[Any, ...]:
        assert x.dropout_p == 0.0 and x.return_debug_mask is False
        for y in (x.query, x.key, x.value):
            assert y.shape[-1] % 8 == 0 and y.shape[-1] <= 256 and aligned(y)
        o, lse = attention(x.query, x.key, x.value, bottom_right(x), x.scale)
        return like_tokens_first(o), lse, None, None, x.query.shape[2], x.key.shape[2], None, None, None

    @staticmethod
    def flash_attention_backward(x: SimpleNamespace) -> tuple[Any, ...]:
        assert x.cum_seq_q is None and x.cum_seq_k is None and x.dropout_p == 0.0
        assert (x.max_q, x.max_k) == (x.query.shape[2], x.key.shape[2])
        for y in (x.grad_out, x.query, x.key, x.value, x.out):
            assert y.shape[-1] % 8 == 0 and y.shape[-1] <= 256 and aligned(y)
        lse = x.logsumexp.as_strided(x.query.shape[:3], torch.empty(x.query.shape[:3]).stride())  # by its address
        grads = attention_backward(x.grad_out, x.query, x.key, x.value, x.out, lse, bottom_right(x), x.scale)
        return tuple(like_tokens_first(grad) for grad in grads)

    @staticmethod
    def efficient_attention(x: SimpleNamespace) -> tuple[Any, ...]:
        assert x.attn_bias is None and x.compute_log_sumexp and x.dropout_p == 0.0
        assert x.query.shape[1] == x.key.shape[1] and all(aligned(y) for y in (x.query, x.key, x.value))
        o, lse = attention(x.query, x.key, x.value, top_left(x), x.scale)
        longer = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
        return like_tokens_first(o), longer, None, None

    @staticmethod
    def efficient_attention_backward(x: SimpleNamespace) -> tuple[Any, ...]:
        B, H, T, D = x.query.shape
        assert x.attn_bias is None and x.dropout_p == 0.0 and x.grad_input_mask == [True, True, True, False]
        assert x.key.shape[1] == H and all(aligned(y) for y in (x.grad_out_, x.query, x.key, x.value, x.out))
        assert x.logsumexp.shape == (B, H, -(-T // 32) * 32) and not any(s % 8 for s in x.logsumexp.stride()[:2])
        assert torch.isinf(x.logsumexp[..., T:]).all() and x.logsumexp.stride(-1) == 1
        o = x.out.as_strided(x.out.shape, (x.out.stride(0), x.out.stride(1), H * D, 1))  # tokens as if contiguous
        inputs = x.grad_out_, x.query, x.key, x.value, o, x.logsumexp[..., :T]
        return *(like_tokens_first(grad) for grad in attention_backward(*inputs, top_left(x), x.scale)), None


def aligned(x: Tensor) -> bool:
    steps = [step for size, step in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    return x.stride(-1) == 1 and not any(step % 8 for step in (*steps, x.storage_offset()))


def like_tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def bottom_right(x: SimpleNamespace) -> Tensor:
    T, S = x.query.shape[2], x.key.shape[2]
    return torch.ones(T, S, dtype=torch.bool).tril(S - T) if x.is_causal else torch.ones(T, S, dtype=torch.bool)


def top_left(x: SimpleNamespace) -> Tensor:
    seen = torch.ones(x.query.shape[2], x.key.shape[2], dtype=torch.bool)
    return seen.tril() if x.is_causal else seen


def awkward(x: Tensor) -> Tensor:
    """The same numbers at strides that no kernel wants: heads before tokens, one number too many in a row."""
    wide = x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 1)
    wide[..., 1:] = x.transpose(1, 2)
    return wide[..., 1:].transpose(1, 2)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaOperators]:
    cuda = CudaOperators()
    monkeypatch.setattr(aten, "_aten", cuda)
    yield cuda


@pytest.mark.parametrize("dim", [8, 5, 200])
@pytest.mark.parametrize(("tokens", "others"), [(37, 50), (1, 3), (32, 7)])
@pytest.mark.parametrize("name", ["FLASH", "EFFICIENT"])
def test_cuda_kernels_stood_in_for(operators: CudaOperators, name: str, tokens: int, others: int, dim: int) -> None:
    x = leaves(tokens, others, dim)
    do = torch.randn(x[0].shape, dtype=torch.float64)
    for form in (lambda y: y, awkward):
        found = in_two_blocks(getattr(attend, name), [form(y) for y in x], form(do))
        compare(found, truth(x, do), 1e-12)
    sum_of_all = torch.ones((), dtype=torch.float64).expand(do.shape)  # as `o.sum()` gives it, all strides 0
    compare(in_two_blocks(getattr(attend, name), x, sum_of_all), truth(x, sum_of_all), 1e-12)
    assert {called.split("_attention")[0] for called in operators.called} == {f"_scaled_dot_product_{name.lower()}"}


@pytest.mark.parametrize("name", ["CPU", "PLAIN"])
def test_kernels_that_run_here(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(formula, "ROWS", 16)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 5e-3)):
        x = leaves(37, 50, 5, dtype)
        do = torch.randn(x[0].shape).to(dtype)
        compare(in_two_blocks(getattr(attend, name), x, do), truth(x, do), bound)


class Called(TorchDispatchMode):
    """Notes which kernels of attention are reached."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.name():
            self.names.append(func.name().removeprefix("aten::_scaled_dot_product_"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "dim", "kernel"),
    [
        (torch.bfloat16, 64, "flash_attention"),
        (torch.float16, 20, "flash_attention"),
        (torch.bfloat16, 200, "flash_attention"),
        (torch.bfloat16, 320, "efficient_attention"),
        (torch.float32, 64, "efficient_attention"),
        (torch.float32, 30, "efficient_attention"),
    ],
    ids=str,
)
def test_cuda_kernels_on_fake_tensors(dtype: torch.dtype, dim: int, kernel: str) -> None:
    """torch's own registrations of shapes take the arguments, on CUDA tensors without memory."""
    with FakeTensorMode(), Called() as called:
        q, do = (torch.empty(2, 37, 4, dim, device="cuda", dtype=dtype) for _ in range(2))
        k, v = (torch.empty(2, 37, 2, dim, device="cuda", dtype=dtype) for _ in range(2))
        used = select_kernel(q, "torch")
        o, lse = used.forward(q, k, v, True, SCALE)
        assert (o.shape, o.dtype) == (q.shape, dtype) and (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
        for grad, x in zip(used.backward(do, q, k, v, o, lse, True, SCALE), (q, k, v), strict=True):
            assert (grad.shape, grad.dtype, grad.device) == (x.shape, dtype, x.device)
        assert select_kernel(q.double(), "torch") is attend.PLAIN
    assert called.names == [kernel, f"{kernel}_backward"]


def test_nothing_is_copied_that_fits() -> None:
    x = torch.randn(2, 9, 4, 24)
    assert layout.fit(x, 24) is x
    part = x[:, 3:, 2:, :16]  # rows of another tensor
    assert layout.fit(part, 16) is part
    for y, dim in ((x[..., 1:17], 16), (x[..., ::2], 12), (x, 32)):
        fitted = layout.fit(y, dim)
        assert torch.equal(fitted[..., : y.shape[-1]], y) and not fitted[..., y.shape[-1] :].any()
        assert fitted.is_contiguous() and fitted.shape[-1] == dim
