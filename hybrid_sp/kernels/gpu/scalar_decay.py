"""The decays within chunks under one log decay per head and token. They are computed once, for every scan to load.

P_t is the sum of g from a chunk's start through t, and R_t the sum after t to its end:

    within = exp(P_t), exp(R_t), and P_t itself in two fp32 numbers, [B,H,4,T]      totals = sum of g over the chunk

Sums are fp64. The two parts of P_t together are as exact, so differences of sums are exact too. No exponent is
positive, and a g that is not a number makes all decays over it not a number.

The reference is `kernels/reference/decays.py`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .segments import Segments

THROUGH, AFTER, HIGH, LOW = (tl.constexpr(i) for i in range(4))  # the rows of `within`


@triton.jit
def at_most_0(x):
    """Return x, or 0 where it is positive. Unlike tl.minimum on a device it returns what is not a number."""
    return tl.where(x > 0.0, 0.0, x)


@triton.jit
def _within_kernel(p_chunks, p_g, p_within, p_totals, s_b, s_t, s_h, T, H, BH, C: tl.constexpr):
    # 1. Find the chunk, batch and head of this program.
    i = tl.program_id(0).to(tl.int64)
    i_n, i_bh = i // BH, i % BH
    start, stop = tl.load(p_chunks + 2 * i_n).to(tl.int64), tl.load(p_chunks + 2 * i_n + 1)
    o_c = tl.arange(0, C)
    m_c = o_c < stop - start
    # 2. Sum its log decays.
    p_g += i_bh // H * s_b + i_bh % H * s_h + start * s_t
    b_g = tl.load(p_g + o_c * s_t, mask=m_c, other=0.0).to(tl.float64)
    b_sum, total = tl.cumsum(b_g, 0), tl.sum(b_g, 0)
    b_high = b_sum.to(tl.float32)
    # 3. Store the decays, and the sums in two parts.
    p_within += i_bh * 4 * T + start + o_c
    tl.store(p_within + THROUGH * T, tl.exp(b_high), mask=m_c)
    tl.store(p_within + AFTER * T, tl.exp(at_most_0((total - b_sum).to(tl.float32))), mask=m_c)
    tl.store(p_within + HIGH * T, b_high, mask=m_c)
    tl.store(p_within + LOW * T, (b_sum - b_high.to(tl.float64)).to(tl.float32), mask=m_c)
    tl.store(p_totals + i, total.to(tl.float32))


@triton.jit
def between(b_high, b_low, REVERSE: tl.constexpr):
    """Compute the decays between the tokens of each pair of a chunk, [out, source]."""
    b_sum = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    if REVERSE:
        b_sum = -b_sum
    return tl.exp(at_most_0(b_sum))


def decays_within(g_BTH: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Compute totals_NBH and within [B,H,4,T], fp32."""
    B, T, H = g_BTH.shape
    totals = g_BTH.new_empty(len(segments.chunks), B, H)
    within = g_BTH.new_empty(B, H, 4, T)
    tile = tuning.entry("within", 1, 1, torch.float32, g_BTH.device)
    launch(
        _within_kernel,
        (totals.numel(),),
        *(segments.chunks, g_BTH, within, totals, *g_BTH.stride(), T, H, B * H),
        num_warps=tile.warps,
        num_stages=tile.stages,
        C=segments.chunk,
    )
    return totals, within
