"""Softmax attention of one block on one device, with the log-sum-exp that lets blocks be merged.

    o_t = sum over s of exp(scale * q_t . k_s - lse_t) v_s          lse_t = log sum over s of exp(scale * q_t . k_s)

Blocks over disjoint keys merge by their lse. The backward of a block takes the output and lse of the whole: with those,
the gradients of all blocks add up (FlashAttention, arXiv 2205.14135, appendix B). The work is torch's fused kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """o [B,T,H,D] and lse [B,T,H] (fp32, or fp64) of q [B,T,H,D] over k, v [B,S,G,D]; causal needs T = S."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        q, k, v = (_wide(x) for x in (q, k, v))
        o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    else:
        k, v = _repeat(k, q), _repeat(v, q)
        if q.dtype in (torch.float16, torch.bfloat16):
            o, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
        else:
            o, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
            lse = lse[..., : q.shape[2]]
    return o.transpose(1, 2), lse.transpose(1, 2)


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block, from the output o, its gradient and the lse of the whole attention."""
    groups = k.shape[2]
    do, q, k, v, o, lse = (x.transpose(1, 2) for x in (do, q, k, v, o, lse))
    if q.device.type == "cpu":
        do, q, k, v, o = (_wide(x) for x in (do, q, k, v, o))
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(do, q, k, v, o, lse, 0.0, causal, scale=scale)
    else:
        k, v = _repeat(k, q), _repeat(v, q)
        lse, none = lse.contiguous(), torch.zeros((), dtype=torch.int64, device=q.device)
        if q.dtype in (torch.float16, torch.bfloat16):
            sizes = (None, None, q.shape[2], k.shape[2], 0.0, causal, none, none)
            grads = _aten._scaled_dot_product_flash_attention_backward(do, q, k, v, o, lse, *sizes, scale=scale)
        else:
            needed = [True, True, True, False]
            backward = _aten._scaled_dot_product_efficient_attention_backward
            grads = backward(do, q, k, v, None, o, lse, none, none, 0.0, needed, causal, scale=scale)
    dq, dk, dv = (x.transpose(1, 2) for x in grads[:3])
    if dk.shape[2] != groups:
        dk, dv = (x.unflatten(2, (groups, -1)).sum(3) for x in (dk, dv))
    return dq, dk, dv


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both blocks, in the dtype of lse."""
    lse = torch.logaddexp(lse_a, lse_b)
    return o_a * (lse_a - lse).exp().unsqueeze(-1) + o_b * (lse_b - lse).exp().unsqueeze(-1), lse


def _wide(x: Tensor) -> Tensor:
    """At least fp32: the CPU kernel's gradients in bf16 miss the promised 5e-3, and it is no faster there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)
