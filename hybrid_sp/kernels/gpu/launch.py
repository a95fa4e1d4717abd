"""Launch every kernel from one place, so a test can compile each launch without a device, and prepare its tensors."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
    """Run kernel[grid](*args, **constants) on the device of the first tensor among the arguments. Tensors are passed as
    pointers. An empty grid launches nothing."""
    if 0 in grid:
        return
    with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def rows(x_BTHD: Tensor) -> Tensor:
    """Return x as kernels read it: the last dim is contiguous, and offsets within a chunk fit in 32 bits."""
    return x_BTHD if x_BTHD.stride(-1) == 1 and x_BTHD.stride(1) < 1 << 24 else x_BTHD.contiguous()


@triton.jit
def _square(p_x, p_out, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x = tl.load(p_x + o)
    tl.store(p_out + o, tl.dot(b_x, b_x))


@functools.cache
def check_interpreter() -> None:
    """Raise RuntimeError if Triton's interpreter multiplies the bits of bf16 numbers as integers, as it comes."""
    x, out = torch.full((16, 16), 1.5, dtype=torch.bfloat16), torch.zeros(16, 16)
    launch(_square, (1,), x, out, N=16, num_warps=1, num_stages=1)
    if not torch.equal(out, torch.full_like(out, 16 * 1.5**2)):
        raise RuntimeError(
            "Triton's interpreter multiplies bf16 numbers as integers, and decays per key channel are sums of such "
            'products in every dtype; use backend="torch" on a CPU, or mend the interpreter as '
            "tests/support/interpreter.py does"
        )
