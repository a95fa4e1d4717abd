"""Launch every kernel from one place, so a test can compile each launch without a device, and prepare its tensors."""

from __future__ import annotations

from typing import Any

import torch
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
