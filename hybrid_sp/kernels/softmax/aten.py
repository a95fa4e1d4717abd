"""The torch kernels of softmax attention: flash for the CPU and for CUDA, and the memory-efficient one.

Each is a pair of functions with the arguments of `attend.Kernel`. Inside, tensors are [B,H,T,D].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..heads import repeat_heads, sum_groups
from .layout import Grads, fit, flash_dim, from_kernel, wide

_aten = torch.ops.aten


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (wide(x).transpose(1, 2) for x in (q, k, v))
    o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return o.transpose(1, 2), lse.transpose(1, 2)


def cpu_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> Grads:
    do, q, k, v, o = (wide(x).transpose(1, 2) for x in (do, q, k, v, o))
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = (x.transpose(1, 2) for x in backward(do, q, k, v, o, lse.transpose(1, 2), 0.0, causal, scale=scale))
    return dq, sum_groups(dk, k.shape[1]), sum_groups(dv, k.shape[1])


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Compute o and lse. The kernel takes fewer key heads than query heads without a copy."""
    dim, width = q.shape[-1], flash_dim(q.shape[-1])
    q, k, v = (fit(x, width).transpose(1, 2) for x in (q, k, v))
    o, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return from_kernel(o, dim), lse.transpose(1, 2)


def flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> Grads:
    """Compute dq, dk, dv. The kernel reads lse by its address, as [B,H,T] contiguous. It needs the state of random
    numbers only for dropout."""
    dim, width = q.shape[-1], flash_dim(q.shape[-1])
    do, q, k, v, o = (fit(x, width).transpose(1, 2) for x in (do, q, k, v, o))
    lse, random = lse.transpose(1, 2).contiguous(), _no_random(q)
    dense = None, None, q.shape[2], k.shape[2]  # the batch is not packed, so sequences have no bounds
    backward = _aten._scaled_dot_product_flash_attention_backward
    dq, dk, dv = backward(do, q, k, v, o, lse, *dense, 0.0, causal, random, random, scale=scale)
    return from_kernel(dq, dim), from_kernel(dk, dim), from_kernel(dv, dim)


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Compute o and lse. The kernel needs as many key heads as query heads, and pads its lse to a multiple of 32
    rows."""
    tokens, dim, width = q.shape[1], q.shape[-1], -(-q.shape[-1] // 8) * 8
    k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    q, k, v = (fit(x, width).transpose(1, 2) for x in (q, k, v))
    o, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return from_kernel(o, dim), lse.transpose(1, 2).narrow(1, 0, tokens)


def efficient_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> Grads:
    """Compute dq, dk, dv. The kernel reads o [B,T,H,D] as if its tokens were contiguous, whatever their stride. It
    checks no bounds in lse: rows up to a multiple of 32 must hold inf, so exp(-inf) adds nothing."""
    groups, dim, width = k.shape[2], q.shape[-1], -(-q.shape[-1] // 8) * 8
    k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    do, q, k, v = (fit(x, width).transpose(1, 2) for x in (do, q, k, v))
    o = fit(o, width).contiguous().transpose(1, 2)
    rows = pad(lse.transpose(1, 2), (0, -lse.shape[1] % 32), value=float("inf")).contiguous()
    random, wanted = _no_random(q), [True, True, True, False]
    backward = _aten._scaled_dot_product_efficient_attention_backward
    dq, dk, dv = backward(do, q, k, v, None, o, rows, random, random, 0.0, wanted, causal, scale=scale)[:3]
    return from_kernel(dq, dim), sum_groups(from_kernel(dk, dim), groups), sum_groups(from_kernel(dv, dim), groups)


def _no_random(q: Tensor) -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device=q.device)
