"""The convolution of one rank's tokens: the size of a block does not matter, forward or backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_sp.kernels.reference import conv
from hybrid_sp.kernels.reference.conv import Taps
from tests.support.oracle import assert_close

STARTS = [1, 2, 9, 10, 14]


def results(weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    make = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(2, 17, 3, generator=make, dtype=torch.float64) for _ in range(2))
    taps = Taps(weight, STARTS, x)
    y = conv.local_forward(x.to(dtype), taps, bias, torch.float64)
    return [y, *conv.local_backward(dy, x.to(dtype), taps, True, weight is not None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [0, 1, 4])
def test_blocks(monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype) -> None:
    weight = torch.randn(3, width, dtype=torch.float64) if width else None
    bias = torch.randn(3, dtype=torch.float64) if width == 4 else None
    whole = results(weight, bias, dtype)
    for tokens in (1, 2, 5, 16):
        monkeypatch.setattr(conv, "BLOCK", tokens * 2 * 3)
        for name, got, want in zip(("y", "dx", "dweight"), results(weight, bias, dtype), whole, strict=True):
            assert_close(f"{name} in blocks of {tokens}", got, want, 1e-14)
