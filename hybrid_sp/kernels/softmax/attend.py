"""The softmax attention of one block on one device. It returns the log-sum-exp, with which blocks can be merged.

    o_t = sum over s of exp(scale * q_t . k_s - lse_t) v_s          lse_t = log sum over s of exp(scale * q_t . k_s)

Keys and values may have different widths: the narrower ones get columns of zeros. A sink is a logit without a value,
one per query head, that takes a share of the denominator.

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
from torch.nn.functional import pad

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
    """Compute o [B,T,H,V] and lse [B,T,H] (fp32, or fp64) of q [B,T,H,D] over k [B,S,G,D] and v [B,S,G,V]. causal needs
    T = S."""
    value = v.shape[-1]
    q, k, v = _equally_wide(q, k, v)
    o, lse = select_kernel(q, backend).forward(q, k, v, causal, scale)
    return o[..., :value], lse


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float, backend: str
) -> Grads:
    """Compute dq, dk, dv of one block, from the output o, its gradient and the lse of the whole attention."""
    key, value = k.shape[-1], v.shape[-1]
    do, q, k, v, o = _equally_wide(do, q, k, v, o)
    dq, dk, dv = select_kernel(q, backend).backward(do, q, k, v, o, lse, causal, scale)
    return dq[..., :key], dk[..., :key], dv[..., :value]


def _equally_wide(*tensors: Tensor) -> list[Tensor]:
    """Pad the last dim of narrower tensors with zeros, which change neither scores nor outputs."""
    widest = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == widest else pad(x, (0, widest - x.shape[-1])) for x in tensors]


def empty_output(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Allocate o [B,T,H,V] and lse [B,T,H] for q, in the precision of sums: fp32, or fp64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], width, dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)


def add_sinks(o: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Add the sinks [H] to the denominator of o [B,T,H,V] and lse [B,T,H], in place."""
    sinks = sinks.to(lse.dtype)
    o *= torch.sigmoid(lse - sinks).unsqueeze(-1)
    torch.logaddexp(lse, sinks, out=lse)


def sinks_backward(do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Compute the gradient of the sinks [H], from o and lse with sinks.

    d sink = -sum over t of exp(sink - lse_t) (do_t . o_t): a sink has no value, so it only takes from the others.
    """
    share = (sinks.to(lse.dtype) - lse).exp()
    parts = share * (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)
    return -parts.sum((0, 1), dtype=torch.float64)  # they cancel, and there are few numbers to sum so


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the attention over two blocks of keys, in the dtype of lse.

    The weights of the blocks add up to 1 exactly, although an lse is rounded to a few digits after the point.
    """
    share_b = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    return o_a + (o_b - o_a) * share_b, torch.logaddexp(lse_a, lse_b)


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
