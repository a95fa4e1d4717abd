"""The states between the segments of a rank: the state that leaves each, and the chain of them, forward and in reverse.

    leaving(i)  = sum over t in segment i of y_t^T exp(sum of g after t) z_t          `summary`, y, z = k, v
    S(i + 1)    = exp(sum of g in segment i) S(i) + leaving(i)                        `fold`

In reverse both work on gradients. `summary` has y, z = q, do and the sum of g through t, and computes the gradient at
the start of each segment. `fold` goes from the last segment to the first, and computes the gradient at the end of each.
A document that begins cuts the chain.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .chunk_scan import Decay, column_apart, factor, strides, types
from .launch import launch
from .scalar_decay import AFTER, THROUGH
from .segments import COLUMNS, FIRST, LAST, NEW, Segments, places


@triton.jit
def summary_kernel(
    p_y,
    p_z,
    p_decay,  # log decays of chunks [N,B,H] or [N,B,H,D]
    p_within,  # scalar decays within chunks [B,H,4,T]
    p_S,  # state that leaves each segment, if none enters [segments,B,H,D,W]
    p_total,  # log decay of each segment [segments,B,H] or [segments,B,H,D]; if TOTAL
    p_table,
    write,
    B,
    T,
    H,
    D,
    W,
    R_y,
    R_z,
    s_yb,
    s_yt,
    s_yh,
    s_zb,
    s_zt,
    s_zh,
    s_S,
    s_Sd,
    C: tl.constexpr,
    BD: tl.constexpr,
    BW: tl.constexpr,
    STRIDE: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    TOTAL: tl.constexpr,
    SPLIT_Z: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 1. Find the tile, batch, head and segment of this program. Its state begins at 0.
    i_tile, i_bh, i_s = places(tl.cdiv(D, BD) * tl.cdiv(W, BW), B * H)
    i_d, i_w = i_tile // tl.cdiv(W, BW), i_tile % tl.cdiv(W, BW)
    i_b, i_h = i_bh // H, i_bh % H
    start = tl.load(p_table + i_s * STRIDE).to(tl.int64)
    stop = tl.load(p_table + i_s * STRIDE + 1).to(tl.int64)
    first = tl.load(p_table + i_s * STRIDE + 2).to(tl.int64)
    count = tl.cdiv(stop - start, C).to(tl.int32)

    o_c, o_d, o_w = tl.arange(0, C), i_d * BD + tl.arange(0, BD), i_w * BW + tl.arange(0, BW)
    m_d, m_w = o_d < D, o_w < W
    p_y += i_b * s_yb + (i_h // R_y) * s_yh
    p_z += i_b * s_zb + (i_h // R_z) * s_zh
    p_within += i_bh * 4 * T + ((THROUGH if REVERSE else AFTER) * T + o_c)
    b_S = tl.zeros([BD, BW], dtype=tl.float32)
    b_total = tl.zeros([BD if DECAY == "rows" else 1], dtype=tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        # 2. Load the tokens of the chunk.
        i_n = (count - 1 - i) if REVERSE else i
        t = start + i_n * C
        m_t = o_c < stop - t
        m_y, m_z = m_t[:, None] & m_d[None, :], m_t[:, None] & m_w[None, :]
        b_y = tl.load(p_y + t * s_yt + (o_c[:, None] * s_yt + o_d[None, :]), mask=m_y, other=0.0).to(DTYPE)
        b_z = tl.load(p_z + t * s_zt + (o_c[:, None] * s_zt + o_w[None, :]), mask=m_z, other=0.0)
        written = write
        if SPLIT_Z:
            b_z, _, z_unit = factor(b_z, DTYPE)
            written *= z_unit
        b_z = b_z.to(DTYPE)
        inside = 1.0 if DTYPE.is_fp16() else written  # fp16 may not hold b_z * written: scale the product
        # 3. Decay z to the end of the chunk (in reverse to its start), and the state over the chunk.
        if DECAY == "scalar":
            b_write = tl.load(p_within + t, mask=m_t, other=0.0)
            b_z = (b_z.to(tl.float32) * (b_write * inside)[:, None]).to(DTYPE)
            b_a = tl.load(p_decay + ((first + i_n) * B * H + i_bh) + tl.arange(0, 1))
            b_S *= tl.exp(b_a)[:, None]
            b_total += b_a
        elif REVERSE:
            b_z = (b_z.to(tl.float32) * inside).to(DTYPE)
        if DECAY == "rows":
            b_a = tl.load(p_decay + ((first + i_n) * B * H + i_bh) * D + o_d, mask=m_d, other=0.0)
            b_S *= tl.exp(b_a)[:, None]
            b_total += b_a
        # 4. Add y^T z to the state.
        if DTYPE.is_fp16():
            b_S += tl.dot(tl.trans(b_y), b_z, input_precision=PRECISION) * written
        else:
            b_S = tl.dot(tl.trans(b_y), b_z, b_S, input_precision=PRECISION)
    # 5. Store the state and the segment's log decay.
    p_S += (i_s * B * H + i_bh) * s_S
    tl.store(p_S + o_d[:, None] * s_Sd + o_w[None, :], b_S, mask=m_d[:, None] & m_w[None, :])
    if DECAY == "scalar" and TOTAL:
        tl.store(p_total + i_s * B * H + i_bh + tl.arange(0, 1), b_total, mask=i_tile == 0)
    if DECAY == "rows" and TOTAL:
        tl.store(p_total + (i_s * B * H + i_bh) * D + o_d, b_total, mask=m_d & (i_w == 0))


@triton.jit
def fold_kernel(
    p_added,  # ADDED: state that leaves each segment, if none enters [segments,B,H,K,V]
    p_total,
    p_given,  # state that enters each span, in reverse the gradient at its end [spans,B,H,K,V]
    p_S,  # state that enters each segment, in reverse the gradient at its end
    p_left,  # ADDED: state that leaves each span, in reverse the gradient at its start
    p_beside,  # BESIDE: added to what is stored in p_S [segments,B,H,K,V]
    p_table,
    count,
    BH,
    K,
    V,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    BEGINS: tl.constexpr,
    DECAY: tl.constexpr,
    ENTERED: tl.constexpr,
    ADDED: tl.constexpr,
    BESIDE: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 1. Find the numbers of the state that this program folds, and the batch and head.
    i_tile, i_bh, _ = places(tl.cdiv(K * V, BLOCK), BH)
    o = i_tile * BLOCK + tl.arange(0, BLOCK)
    m = o < K * V
    b_S = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        # 2. At the start of a span (in reverse at its end) take the given state, or 0. A new document cuts the chain.
        i_s = tl.cast(count - 1 - i if REVERSE else i, tl.int64)
        span = tl.load(p_table + i_s * STRIDE + 3).to(tl.int64)
        flags = tl.load(p_table + i_s * STRIDE + 4)
        o_span, o_here = (span * BH + i_bh) * K * V + o, (i_s * BH + i_bh) * K * V + o
        at_start = (flags & FROM) != 0
        if ENTERED:
            b_S = tl.where(at_start, tl.load(p_given + o_span, mask=m & at_start, other=0.0), b_S)
        else:
            b_S = tl.where(at_start, 0.0, b_S)
        if not REVERSE:
            b_S = tl.where((flags & BEGINS) != 0, 0.0, b_S)
        # 3. Store the state that enters this segment.
        if BESIDE:
            tl.store(p_S + o_here, b_S + tl.load(p_beside + o_here, mask=m, other=0.0), mask=m)
        else:
            tl.store(p_S + o_here, b_S, mask=m)
        # 4. Decay it over the segment, and add the state that the segment gives.
        if DECAY == "scalar":
            b_S *= tl.exp(tl.load(p_total + i_s * BH + i_bh))
        if DECAY == "rows":
            b_S *= tl.exp(tl.load(p_total + (i_s * BH + i_bh) * K + o // V, mask=m, other=0.0))
        if ADDED:
            b_S += tl.load(p_added + o_here, mask=m, other=0.0)
        # 5. In reverse a new document cuts the chain here. Store the state at the end of a span (in reverse its start).
        if REVERSE:
            b_S = tl.where((flags & BEGINS) != 0, 0.0, b_S)
        if ADDED:
            tl.store(p_left + o_span, b_S, mask=m & ((flags & TO) != 0))


def summary(
    y: Tensor,
    z: Tensor,
    segments: Segments,
    dtype: torch.dtype,
    *,
    out: Tensor,
    decay: Decay,
    write: float = 1.0,
    reverse: bool = False,
) -> Tensor | None:
    """Write out [segments,B,H,D,W], the states that leave the segments if none enters, or in reverse the gradients at
    their starts. Return the segments' log decays, None | [segments,B,H] | [segments,B,H,D], or None in reverse."""
    _, B, H, D, W = out.shape
    kind, totals, within = decay
    total = None
    if kind != "none" and not reverse:
        total = torch.empty(
            segments.pieces.count, B, H, *((D,) if kind == "rows" else ()), dtype=torch.float32, device=y.device
        )
    nothing = segments.table
    for wide in column_apart(W):
        out_, z_, total_ = out[..., wide], z[..., wide], total if wide.start == 0 else None
        tile = tuning.entry("summary", D, out_.shape[4], dtype, y.device, (kind,))
        launch(
            summary_kernel,
            (triton.cdiv(D, tile.rows) * triton.cdiv(out_.shape[4], tile.columns) * B * H * segments.pieces.count,),
            y,
            z_,
            nothing if totals is None else totals,
            nothing if within is None else within,
            out_,
            nothing if total_ is None else total_,
            segments.table,
            float(write),
            B,
            z.shape[1],
            H,
            D,
            out_.shape[4],
            H // y.shape[2],
            H // z.shape[2],
            *strides(y),
            *strides(z),
            out.stride(2),
            out.stride(3),
            C=segments.chunk,
            BD=tile.rows,
            BW=tile.columns,
            STRIDE=COLUMNS,
            DECAY=kind,
            REVERSE=reverse,
            TOTAL=total_ is not None,
            SPLIT_Z=z.dtype != dtype,
            **types(dtype),
            num_warps=tile.warps,
            STAGES=tile.stages,
            num_stages=tile.stages,
        )
    return total


def fold(
    added: Tensor, total: Tensor | None, given: Tensor | None, segments: Segments, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the states that enter the segments, and the states that leave the spans [spans,B,H,K,V].

    `added` [segments,B,H,K,V] leaves the segments if none enters, and `given` enters the spans. In reverse, all are
    gradients: `added` at the starts of segments, `given` at the ends of spans. The results are then at the ends of
    segments and at the starts of spans.
    """
    S, left = torch.empty_like(added), added.new_empty(segments.pieces.spans, *added.shape[1:])
    _fold(added.contiguous(), total, given, S, left, None, segments, reverse)
    return S, left


def carry(given: Tensor, total: Tensor | None, beside: Tensor | None, segments: Segments) -> Tensor:
    """Return the part that states `given` to the spans have in the states that enter the segments, plus `beside`."""
    S = given.new_empty(segments.pieces.count, *given.shape[1:])
    _fold(None, total, given, S, None, beside, segments, False)
    return S


def _fold(
    added: Tensor | None,
    total: Tensor | None,
    given: Tensor | None,
    S: Tensor,
    left: Tensor | None,
    beside: Tensor | None,
    segments: Segments,
    reverse: bool,
) -> None:
    """Launch one program for each block of numbers of a state."""
    _, B, H, K, V = S.shape
    given = None if given is None else given.contiguous()
    kind = "none" if total is None else "scalar" if total.ndim == 3 else "rows"
    block = tuning.entry("fold", K, V, S.dtype, S.device, (kind,))
    launch(
        fold_kernel,
        (triton.cdiv(K * V, block.columns) * B * H,),
        *(S if array is None else array for array in (added, total, given, S, left, beside)),
        segments.table,
        segments.pieces.count,
        B * H,
        K,
        V,
        BLOCK=block.columns,
        STRIDE=COLUMNS,
        FROM=LAST if reverse else FIRST,
        TO=FIRST if reverse else LAST,
        BEGINS=NEW,
        DECAY=kind,
        ENTERED=given is not None,
        ADDED=added is not None,
        BESIDE=beside is not None,
        REVERSE=reverse,
        num_warps=block.warps,
        STAGES=block.stages,
        num_stages=block.stages,
    )
