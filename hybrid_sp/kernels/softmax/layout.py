"""The layout of tensors for the kernels of softmax attention: sizes, strides and precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

Grads = tuple[Tensor, Tensor, Tensor]  # dq, dk, dv

WIDEST = 256  # head dim of the flash kernels


def fit(x: Tensor, dim: int) -> Tensor:
    """Prepare x [B,T,H,D] for CUDA kernels, which read 16 bytes at a time. Columns are padded with zeros up to `dim`,
    rows begin at a multiple of 8 numbers, and the last dim is contiguous. x is copied only if it is not so already."""
    if x.shape[-1] != dim:
        return pad(x, (0, dim - x.shape[-1])).contiguous()
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    ready = x.stride(-1) == 1 and not any(step % 8 for step in (*steps, x.storage_offset()))
    return x if ready else x.clone(memory_format=torch.contiguous_format)


def flash_dim(dim: int) -> int:
    """Return the columns of FlashAttention 2: multiples of 8. Above 192 it is always 256, because not every chip
    supports the sizes between."""
    return -(-dim // 8) * 8 if dim <= 192 else WIDEST


def wide(x: Tensor) -> Tensor:
    """Convert x to at least fp32. The CPU kernel's gradients in bf16 miss the promised 5e-3, and bf16 is no faster
    there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def from_kernel(x: Tensor, dim: int) -> Tensor:
    """Convert the kernel's [B,H,T,width] to [B,T,H,D]."""
    return x.transpose(1, 2).narrow(-1, 0, dim)
