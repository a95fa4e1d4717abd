"""The softmax attention of one block on one device. It returns the log-sum-exp, with which blocks can be merged.

    o_t = sum over s of exp(scale * q_t . k_s - lse_t) v_s          lse_t = log sum over s of exp(scale * q_t . k_s)

Blocks over disjoint keys merge by their lse. The backward of a block reads the output and lse of the whole attention.
With those, the gradients of all blocks add up (FlashAttention, arXiv 2205.14135, appendix B). A fused kernel does the
work:

    CPU                         torch's flash kernel for the CPU
    CUDA, bf16 and fp16         torch's flash kernel, up to 256 dims; flash_attn.py by backend="flash_attn"
    CUDA, fp32; more dims       torch's memory-efficient kernel, whose fp32 products are three of TF32
    CUDA, fp64; elsewhere       the formula, a block of rows at a time

torch's cuDNN kernel is not used. The rank of its lse has changed between releases ([B,H,T], then [B,H,T,1]), and its
backward has no deterministic form. It also plans again for every shape, and a mask made of tiles has many shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import aten, flash_attn, formula
from .layout import WIDEST, Grads


class Kernel(NamedTuple):
    """The functions `forward(q, k, v, causal, scale)` and `backward(do, q, k, v, o, lse, causal, scale)` of one kernel,
    as below."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Grads]


CPU = Kernel(aten.cpu_forward, aten.cpu_backward)
FLASH = Kernel(aten.flash_forward, aten.flash_backward)
EFFICIENT = Kernel(aten.efficient_forward, aten.efficient_backward)
PLAIN = Kernel(formula.forward, formula.backward)
FLASH_ATTN = Kernel(flash_attn.forward, flash_attn.backward)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Compute o [B,T,H,D] and lse [B,T,H] (fp32, or fp64) of q [B,T,H,D] over k, v [B,S,G,D]. causal needs T = S."""
    return select_kernel(q, backend).forward(q, k, v, causal, scale)


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float, backend: str
) -> Grads:
    """Compute dq, dk, dv of one block, from the output o, its gradient and the lse of the whole attention."""
    return select_kernel(q, backend).backward(do, q, k, v, o, lse, causal, scale)


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the attention over two blocks of keys, in the dtype of lse."""
    lse = torch.logaddexp(lse_a, lse_b)
    return o_a * (lse_a - lse).exp().unsqueeze(-1) + o_b * (lse_b - lse).exp().unsqueeze(-1), lse


def select_kernel(q: Tensor, backend: str) -> Kernel:
    """Select the kernel for q and a backend of `softmax_attention`. Raise ImportError if the backend's package is
    missing."""
    if backend == "flash_attn":
        flash_attn.package(q)
        return FLASH_ATTN
    if q.device.type == "cpu":
        return CPU
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return PLAIN
    return FLASH if q.dtype != torch.float32 and q.shape[-1] <= WIDEST else EFFICIENT
