"""How tensors lie for the kernels of softmax attention: sizes, strides, and key heads fewer than query heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

Grads = tuple[Tensor, Tensor, Tensor]  # dq, dk, dv

WIDEST = 256  # head dim of the flash kernels


def fit(x: Tensor, dim: int) -> Tensor:
    """x [B,T,H,D] as CUDA kernels read it, 16 bytes at a time: zeros up to `dim` columns, rows that begin at a multiple
    of 8 numbers, the last dim contiguous. A copy only where it is not so already."""
    if x.shape[-1] != dim:
        return pad(x, (0, dim - x.shape[-1])).contiguous()
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    ready = x.stride(-1) == 1 and not any(step % 8 for step in (*steps, x.storage_offset()))
    return x if ready else x.clone(memory_format=torch.contiguous_format)


def flash_dim(dim: int) -> int:
    """The columns of FlashAttention 2: multiples of 8; above 192 all 256, for not every chip has those between."""
    return -(-dim // 8) * 8 if dim <= 192 else WIDEST


def wide(x: Tensor) -> Tensor:
    """At least fp32: the CPU kernel's gradients in bf16 miss the promised 5e-3, and it is no faster there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def from_kernel(x: Tensor, dim: int) -> Tensor:
    """[B,T,H,D] from the kernel's [B,H,T,width]."""
    return x.transpose(1, 2).narrow(-1, 0, dim)


def repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """As many key heads as query heads, [B,S,H,D]."""
    return x if x.shape[2] == q.shape[2] else x.repeat_interleave(q.shape[2] // x.shape[2], 2)


def sum_groups(x: Tensor, groups: int) -> Tensor:
    """The gradient of each key head, [B,S,G,D], from those of the query heads that read it."""
    return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)
