"""The one door through which kernels are launched, so that a test can compile every launch without a device; and how
tensors come to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
    """kernel[grid](*args, **constants) on the device of the first tensor among the arguments; tensors are passed as
    pointers. An empty grid launches nothing."""
    if 0 in grid:
        return
    with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def rows(x_BTHD: Tensor) -> Tensor:
    """x as kernels read it: the last dim contiguous, and places within a chunk no further apart than 32 bits say."""
    return x_BTHD if x_BTHD.stride(-1) == 1 and x_BTHD.stride(1) < 1 << 24 else x_BTHD.contiguous()
