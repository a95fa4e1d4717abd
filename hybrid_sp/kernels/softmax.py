"""Softmax attention of one block on one device, with the log-sum-exp that lets blocks be merged.

    o_t = sum over s of exp(scale * q_t . k_s - lse_t) v_s          lse_t = log sum over s of exp(scale * q_t . k_s)

Blocks over disjoint keys merge by their lse. The backward of a block takes the output and lse of the whole: with those,
the gradients of all blocks add up (FlashAttention, arXiv 2205.14135, appendix B). The work is that of a fused kernel:

    CPU                         torch's flash kernel for the CPU
    CUDA, bf16 and fp16         torch's flash kernel, up to 256 dims; gpu/flash.py by backend="flash_attn"
    CUDA, fp32; more dims       torch's memory-efficient kernel, whose fp32 products are three of TF32
    CUDA, fp64; elsewhere       the formula, a block of rows at a time

torch's cuDNN kernel is left out: the rank of its lse has changed between releases ([B,H,T], then [B,H,T,1]), its
backward has no deterministic form, and it plans anew for every shape, of which a mask made of parts has many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Grads = tuple[Tensor, Tensor, Tensor]  # dq, dk, dv

ROWS = 512  # of the scores of the formula at a time
WIDEST = 256  # head dim of the flash kernels
_aten = torch.ops.aten


class Kernel(NamedTuple):
    """`forward(q, k, v, causal, scale)` and `backward(do, q, k, v, o, lse, causal, scale)`, as below."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Grads]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """o [B,T,H,D] and lse [B,T,H] (fp32, or fp64) of q [B,T,H,D] over k, v [B,S,G,D]; causal needs T = S."""
    return kernel_of(q, backend).forward(q, k, v, causal, scale)


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float, backend: str
) -> Grads:
    """dq, dk, dv of one block, from the output o, its gradient and the lse of the whole attention."""
    return kernel_of(q, backend).backward(do, q, k, v, o, lse, causal, scale)


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both blocks, in the dtype of lse."""
    lse = torch.logaddexp(lse_a, lse_b)
    return o_a * (lse_a - lse).exp().unsqueeze(-1) + o_b * (lse_b - lse).exp().unsqueeze(-1), lse


def kernel_of(q: Tensor, backend: str) -> Kernel:
    """The kernel for tensors such as q by a backend of `softmax_attention`; ImportError if its package is missing."""
    if backend == "flash_attn":
        from .gpu import flash  # which imports the package, that only this choice needs

        flash.package(q)
        return Kernel(flash.forward, flash.backward)
    if q.device.type == "cpu":
        return CPU
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return PLAIN
    return FLASH if q.dtype != torch.float32 and q.shape[-1] <= WIDEST else EFFICIENT


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


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_wide(x).transpose(1, 2) for x in (q, k, v))
    o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return o.transpose(1, 2), lse.transpose(1, 2)


def _cpu_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> Grads:
    do, q, k, v, o = (_wide(x).transpose(1, 2) for x in (do, q, k, v, o))
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = (x.transpose(1, 2) for x in backward(do, q, k, v, o, lse.transpose(1, 2), 0.0, causal, scale=scale))
    return dq, _of_groups(dk, k.shape[1]), _of_groups(dv, k.shape[1])


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel reads fewer key heads than query heads as they are."""
    dim, width = q.shape[-1], flash_dim(q.shape[-1])
    q, k, v = (fit(x, width).transpose(1, 2) for x in (q, k, v))
    o, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return _back(o, dim), lse.transpose(1, 2)


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> Grads:
    """The kernel takes lse by its address, as [B,H,T] contiguous; the state of random numbers only where it drops."""
    dim, width = q.shape[-1], flash_dim(q.shape[-1])
    do, q, k, v, o = (fit(x, width).transpose(1, 2) for x in (do, q, k, v, o))
    lse, random = lse.transpose(1, 2).contiguous(), _no_random(q)
    dense = None, None, q.shape[2], k.shape[2]  # no bounds of sequences in a packed batch
    backward = _aten._scaled_dot_product_flash_attention_backward
    dq, dk, dv = backward(do, q, k, v, o, lse, *dense, 0.0, causal, random, random, scale=scale)
    return _back(dq, dim), _back(dk, dim), _back(dv, dim)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel wants as many key heads as query heads, and makes its lse longer: up to a multiple of 32 rows."""
    tokens, dim, width = q.shape[1], q.shape[-1], -(-q.shape[-1] // 8) * 8
    k, v = _repeat(k, q), _repeat(v, q)
    q, k, v = (fit(x, width).transpose(1, 2) for x in (q, k, v))
    o, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return _back(o, dim), lse.transpose(1, 2).narrow(1, 0, tokens)


def _efficient_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> Grads:
    """The kernel walks through o [B,T,H,D] as if its tokens were contiguous, whatever their stride, and checks no
    bounds in lse: rows up to a multiple of 32 hold inf, and exp(-inf) counts for nothing."""
    groups, dim, width = k.shape[2], q.shape[-1], -(-q.shape[-1] // 8) * 8
    k, v = _repeat(k, q), _repeat(v, q)
    do, q, k, v = (fit(x, width).transpose(1, 2) for x in (do, q, k, v))
    o = fit(o, width).contiguous().transpose(1, 2)
    rows = pad(lse.transpose(1, 2), (0, -lse.shape[1] % 32), value=float("inf")).contiguous()
    random, wanted = _no_random(q), [True, True, True, False]
    backward = _aten._scaled_dot_product_efficient_attention_backward
    dq, dk, dv = backward(do, q, k, v, None, o, rows, random, random, 0.0, wanted, causal, scale=scale)[:3]
    return _back(dq, dim), _of_groups(_back(dk, dim), groups), _of_groups(_back(dv, dim), groups)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = _repeat(k, q), _repeat(v, q)
    q, k, v = (_wide(x).transpose(1, 2) for x in (q, k, v))
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for rows, scores in _scores(q, k, causal, scale):
        lse[:, :, rows] = scores.logsumexp(-1)
        o[:, :, rows] = scores.softmax(-1) @ v
    return o.transpose(1, 2), lse.transpose(1, 2)


def _plain_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> Grads:
    """dS = P * (dP - the part of dP along P), which o and do give without the keys of other blocks."""
    groups, k, v = k.shape[2], _repeat(k, q), _repeat(v, q)
    do, q, k, v, o = (_wide(x).transpose(1, 2) for x in (do, q, k, v, o))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    along = (do * o).sum(-1, keepdim=True)
    for rows, scores in _scores(q, k, causal, scale):
        P = (scores - lse.transpose(1, 2)[:, :, rows, None]).exp()
        dS = P * (do[:, :, rows] @ v.mT - along[:, :, rows]) * scale
        dq[:, :, rows] = dS @ k
        dk += dS.mT @ q[:, :, rows]
        dv += P.mT @ do[:, :, rows]
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return dq, _of_groups(dk, groups), _of_groups(dv, groups)


CPU = Kernel(_cpu_forward, _cpu_backward)
FLASH = Kernel(_flash_forward, _flash_backward)
EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
PLAIN = Kernel(_plain_forward, _plain_backward)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """scale * q k^T [B,H,t,S] of ROWS queries at a time, -inf where a causal mask hides a key; q, k [B,H,T,D]."""
    for first in range(0, q.shape[2], ROWS):
        rows = slice(first, min(first + ROWS, q.shape[2]))
        scores = q[:, :, rows] @ k.mT * scale
        if causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(first + 1)
            scores = scores.masked_fill(later, float("-inf"))
        yield rows, scores


def _wide(x: Tensor) -> Tensor:
    """At least fp32: the CPU kernel's gradients in bf16 miss the promised 5e-3, and it is no faster there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _back(x: Tensor, dim: int) -> Tensor:
    """[B,T,H,D] from the kernel's [B,H,T,width]."""
    return x.transpose(1, 2).narrow(-1, 0, dim)


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """As many key heads as query heads, [B,S,H,D]."""
    return x if x.shape[2] == q.shape[2] else x.repeat_interleave(q.shape[2] // x.shape[2], 2)


def _of_groups(x: Tensor, groups: int) -> Tensor:
    """The gradient of each key head, [B,S,G,D], from those of the query heads that read it."""
    return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)


def _no_random(q: Tensor) -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device=q.device)
