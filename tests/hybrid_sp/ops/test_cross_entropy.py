"""Chunked cross-entropy: torch's, with its gradients, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_sp.ops.cross_entropy import cross_entropy
from tests.support.oracle import assert_close

VOCAB, DIM = 13, 6


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (2, 9), generator=generator)
    labels[0, 3] = labels[1, 5:] = -100
    return x, weight, labels


@pytest.mark.parametrize("chunk", [1, 4, 9, 18, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_the_plain_cross_entropy(chunk: int, dtype: torch.dtype) -> None:
    bound = 1e-13 if dtype == torch.float64 else 1e-6
    x, weight, labels = inputs(dtype)
    loss, valid = cross_entropy(x, weight, labels, chunk=chunk)
    (3 * loss).backward()
    x_plain, weight_plain, _ = inputs(dtype)
    plain = F.cross_entropy((x_plain @ weight_plain.T).flatten(0, 1), labels.flatten(), reduction="sum")
    (3 * plain).backward()
    assert valid.item() == 13
    assert_close("loss", loss, plain, bound)
    assert_close("dx", x.grad, x_plain.grad, bound)
    assert_close("dweight", weight.grad, weight_plain.grad, bound)


def test_bfloat16_sums_in_float32() -> None:
    x, weight, labels = inputs(torch.bfloat16)
    loss, _ = cross_entropy(x, weight, labels, chunk=4)
    loss.backward()
    x_exact, weight_exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact, _ = cross_entropy(x_exact, weight_exact, labels)
    exact.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert_close("loss", loss, exact, 1e-2)
    assert_close("dx", x.grad, x_exact.grad, 1e-2)
    assert_close("dweight", weight.grad, weight_exact.grad, 1e-2)


def test_no_valid_token_is_a_zero_with_a_graph() -> None:
    x, weight, labels = inputs()
    loss, valid = cross_entropy(x, weight, labels.fill_(-100), chunk=4)
    assert loss.item() == 0 and valid.item() == 0
    loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_gradient_of_one_input_alone(frozen: str) -> None:
    x, weight, labels = inputs()
    cross_entropy(x, weight, labels)[0].backward()
    want = {"x": x.grad, "weight": weight.grad}
    got = dict(zip(("x", "weight"), inputs()[:2], strict=True))
    got[frozen].requires_grad_(False)
    cross_entropy(**{"x_BTD": got["x"], "weight_VD": got["weight"]}, labels_BT=labels)[0].backward()
    for name, tensor in got.items():
        if name == frozen:
            assert tensor.grad is None
        else:
            assert_close(name, tensor.grad, want[name], 1e-14)


class LargestLogits(TorchDispatchMode):
    """Remembers the most rows of any tensor made that has the vocabulary as its last dim."""

    rows = 0
    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == VOCAB:
            self.rows = max(self.rows, out.shape[:-1].numel())
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        return out


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    x, weight, labels = inputs()
    with LargestLogits() as seen:
        loss, _ = cross_entropy(x, weight.detach(), labels, chunk=4)
        loss.backward()
    assert 0 < seen.rows <= max(4, DIM)  # the weight transposed has DIM rows
    with LargestLogits() as seen:
        plain = F.cross_entropy((x @ weight.detach().T).flatten(0, 1), labels.flatten())
    assert seen.rows == 18 and plain.ndim == 0


def test_without_gradients_no_product_is_spent_on_them() -> None:
    x, weight, labels = inputs()
    with torch.no_grad(), LargestLogits() as seen:
        loss, _ = cross_entropy(x, weight, labels, chunk=9)
    assert seen.products == 2 and not loss.requires_grad
    with LargestLogits() as seen:
        cross_entropy(x, weight, labels, chunk=9)
    assert seen.products == 6
