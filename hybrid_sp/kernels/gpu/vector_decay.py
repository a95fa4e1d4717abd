"""The change of variables within chunks for a decay per key channel. After it only whole chunks decay.

In one chunk of one head, P_t is the sum of g from the chunk's start through t, and R_t the sum after t to its end. u is
a bonus; with it the sums in P_t and A exclude g_t.

    k_until_t = exp(R_t) k_t                  totals = sum of g over the chunk
    q_since_t = exp(P_t) q_t                  A[t, s] = q_t . exp(g_(s+1) + ... + g_t) k_s            s <= t
                                      bonus:  A[t, s] = q_t . exp(g_(s+1) + ... + g_(t-1)) k_s        s < t
                                              A[t, t] = q_t . u k_t

A is computed by halving, as in `reference/decay_mask.py`. At each level a chunk is divided into pairs of runs of `half`
rows. The scores between a right run and its left run are one matrix product. Its factors are q_t exp(sum from the right
run's start to t) and k_s exp(sum after s to the left run's end). A row is in a right or in a left run, so a level needs
one factor per row. Here a level is computed for the whole chunk at once, and its mask keeps the scores in pairs.

In the adjoints, dA = scale * do v^T, and `dq_A` and `dk_A` are the gradients of q and k through A (without its
diagonal):

    dq = exp(P) dq_since + dq_A + diag(dA) u k      dk = exp(R) dk_until + dk_A + diag(dA) u q
    dg = sums from t of (q (exp(P) dq_since + dq_A) - k dk_A) + sums before t of (k exp(R) dk_until) + d_totals
    bonus: sums after t of (q (exp(P) dq_since + dq_A)) - sums from t of (k dk_A) + ...        du = sum of diag(dA) q k

Sums over rows are products with zeros and ones, on tensor cores. The summands are split into bf16 parts, which together
are as exact as the sum needs. No sum is the difference of two others, and no exponent is ever positive.

The references are `kernels/reference/linear.py` and `kernels/reference/decay_mask.py`. Halving of a chunk is ours; the
change of variables is GLA's (arXiv 2312.06635, section 4).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .chunk_scan import factor
from .launch import launch, rows
from .segments import Segments


@triton.jit
def _dot(a, b, DTYPE: tl.constexpr):
    """Multiply fp32 tiles rounded to DTYPE, with sums in fp32."""
    a, b = a.to(DTYPE), b.to(DTYPE)
    if DTYPE.is_fp32():
        product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a, b)
    return product


@triton.jit
def _ones(o_from, o_until, C: tl.constexpr):
    """Return 1 at [t, j] for the rows j from o_from[t] up to and excluding o_until[t], else 0."""
    o_j = tl.arange(0, C)[None, :]
    return tl.where((o_j >= o_from[:, None]) & (o_j < o_until[:, None]), 1.0, 0.0)


@triton.jit
def _sums(x_CK, o_from, o_until, C: tl.constexpr, DTYPE: tl.constexpr):
    """Sum the rows of x from o_from[t] up to o_until[t], for each row t. Three bf16 parts of x hold it exactly (24
    bits). Two parts are more exact than 16-bit operands need."""
    ones = _ones(o_from, o_until, C)
    part = x_CK.to(tl.bfloat16).to(tl.float32)
    sums = _dot(ones, part, tl.bfloat16)
    rest = x_CK - part
    part = rest.to(tl.bfloat16).to(tl.float32)
    sums += _dot(ones, part, tl.bfloat16)
    if DTYPE.is_fp32():
        sums += _dot(ones, rest - part, tl.bfloat16)
    return sums


@triton.jit
def _decays(g_CK, o_from, o_until, C: tl.constexpr, DTYPE: tl.constexpr):
    """Return exp of the sums of log decays. For 16-bit operands g in fp16 is exact enough. An error of 2^-12 x in an
    exponent -x changes the weight by at most 2^-12 x exp(-x)."""
    if DTYPE.is_fp32():
        sums = _sums(g_CK, o_from, o_until, C, DTYPE)
    else:
        sums = _dot(_ones(o_from, o_until, C), g_CK, tl.float16)
    return tl.exp(sums)


@triton.jit
def _to_middle(g_CK, o_c, half, C: tl.constexpr, EXCLUSIVE: tl.constexpr, DTYPE: tl.constexpr):
    """Return the decay between each row and the middle of its pair of runs of `half` rows. In a right run it goes from
    the run's start through the row (EXCLUSIVE: to before it). In a left run it goes from after the row to the run's
    end."""
    start, right = o_c & -half, (o_c & half) != 0
    through = o_c if EXCLUSIVE else o_c + 1
    return _decays(g_CK, tl.where(right, start, o_c + 1), tl.where(right, through, start + half), C, DTYPE)


@triton.jit
def _rectangles(o_c, half):
    """Return the mask [t, s] of t in a right run of `half` rows and s in the left run of its pair."""
    start, right = o_c & -half, (o_c & half) != 0
    return tl.where(right, start - half, -1)[:, None] == start[None, :]


@triton.jit
def _chunk(p_chunks, BH):
    """Return the tokens [start, stop) of this program's chunk, the chunk's index on the rank, and the index of batch
    and head."""
    i = tl.program_id(0).to(tl.int64)
    i_n = i // BH
    return tl.load(p_chunks + 2 * i_n), tl.load(p_chunks + 2 * i_n + 1), i_n, i % BH


@triton.jit
def _keys_forward_kernel(
    p_chunks, p_k, p_g, p_until, p_totals,
    k_b, k_t, k_h, g_b, g_t, g_h, batch, tokens, heads, shared,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # 1. Find the chunk, batch and head of this program.
    o_first, o_stop, i_n, i_bh = _chunk(p_chunks, batch * heads)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_c, o_end = tl.arange(0, C), tl.full([C], C, tl.int32)
    o_t = (o_first + o_c).to(tl.int64)
    m_t = (o_first + o_c) < o_stop
    p_k += i_b * k_b + (i_h // shared) * k_h
    p_g += i_b * g_b + i_h * g_h
    p_until += ((i_b * tokens + o_t) * heads + i_h)[:, None] * K
    p_totals += ((i_n * batch + i_b) * heads + i_h) * K
    for i_k in range(0, K, BK):
        # 2. Load BK channels of the decays and keys.
        o_k = i_k + tl.arange(0, BK)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        b_g = tl.load(p_g + o_t[:, None] * g_t + o_k[None, :], mask=m_tk, other=0.0)
        b_k = tl.load(p_k + o_t[:, None] * k_t + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        # 3. Store k_until = exp(R) k, and totals, the decay of the whole chunk.
        b_until = _decays(b_g, o_c + 1, o_end, C, p_k.dtype.element_ty) * b_k
        tl.store(p_until + o_k[None, :], b_until.to(p_until.dtype.element_ty), mask=m_tk)
        tl.store(p_totals + o_k, tl.sum(b_g, 0), mask=o_k < K)


@triton.jit
def _keys_backward_kernel(
    p_chunks, p_d_until, p_dk, p_dg, p_k, p_g, p_d_totals,
    u_b, u_t, u_h, dk_b, dk_t, dk_h, dg_b, dg_t, dg_h, k_b, k_t, k_h, g_b, g_t, g_h, batch, tokens, heads, shared,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # 1. Find the chunk, batch and head of this program.
    o_first, o_stop, i_n, i_bh = _chunk(p_chunks, batch * heads)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_c, o_start, o_end = tl.arange(0, C), tl.zeros([C], tl.int32), tl.full([C], C, tl.int32)
    o_t = (o_first + o_c).to(tl.int64)
    m_t = (o_first + o_c) < o_stop
    p_d_until += i_b * u_b + i_h * u_h
    p_dk += i_b * dk_b + i_h * dk_h
    p_dg += i_b * dg_b + i_h * dg_h
    p_k += i_b * k_b + (i_h // shared) * k_h
    p_g += i_b * g_b + i_h * g_h
    p_d_totals += ((i_n * batch + i_b) * heads + i_h) * K
    for i_k in range(0, K, BK):
        # 2. Load BK channels, and compute exp(R) dk_until.
        o_k = i_k + tl.arange(0, BK)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        b_g = tl.load(p_g + o_t[:, None] * g_t + o_k[None, :], mask=m_tk, other=0.0)
        b_dk = tl.load(p_d_until + o_t[:, None] * u_t + o_k[None, :], mask=m_tk, other=0.0)
        b_dk *= _decays(b_g, o_c + 1, o_end, C, p_k.dtype.element_ty)
        b_k = tl.load(p_k + o_t[:, None] * k_t + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        # 3. Compute dg = sums before t of (k exp(R) dk_until) + d_totals.
        b_dg = _sums(b_dk * b_k, o_start, o_c, C, p_k.dtype.element_ty)
        b_dg += tl.load(p_d_totals + o_k, mask=o_k < K, other=0.0)[None, :]
        # 4. Add both to the gradients that `queries_backward` wrote.
        p_dk_tk, p_dg_tk = p_dk + o_t[:, None] * dk_t + o_k[None, :], p_dg + o_t[:, None] * dg_t + o_k[None, :]
        tl.store(p_dk_tk, b_dk + tl.load(p_dk_tk, mask=m_tk, other=0.0), mask=m_tk)
        tl.store(p_dg_tk, b_dg + tl.load(p_dg_tk, mask=m_tk, other=0.0), mask=m_tk)


@triton.jit
def _queries_forward_kernel(
    p_chunks, p_q, p_k, p_g, p_bonus, p_since, p_A,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, batch, tokens, heads, shared,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr, BONUS: tl.constexpr,
):  # fmt: skip
    # 1. Find the chunk, batch and head of this program.
    o_first, o_stop, _, i_bh = _chunk(p_chunks, batch * heads)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_c, o_start = tl.arange(0, C), tl.zeros([C], tl.int32)
    o_read = o_c if BONUS else o_c + 1
    o_t = (o_first + o_c).to(tl.int64)
    m_t = (o_first + o_c) < o_stop
    p_q += i_b * q_b + (i_h // shared) * q_h
    p_k += i_b * k_b + (i_h // shared) * k_h
    p_g += i_b * g_b + i_h * g_h
    o_out = (i_b * tokens + o_t) * heads + i_h
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    b_A = tl.zeros([C, C], tl.float32)
    b_self = tl.zeros([C], tl.float32)
    for i_k in range(0, K, BK):
        # 2. Load BK channels of the decays, queries and keys.
        o_k = i_k + tl.arange(0, BK)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        b_g = tl.load(p_g + o_t[:, None] * g_t + o_k[None, :], mask=m_tk, other=0.0)
        b_q = tl.load(p_q + o_t[:, None] * q_t + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_t[:, None] * k_t + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        # 3. Store q_since = exp(P) q.
        b_since = _decays(b_g, o_start, o_read, C, DTYPE) * b_q
        tl.store(p_since + o_out[:, None] * K + o_k[None, :], b_since.to(DTYPE), mask=m_tk)
        # 4. Add these channels to the diagonal of A.
        if BONUS:
            b_u = tl.load(p_bonus + i_h * K + o_k, mask=o_k < K, other=0.0)
            b_self += tl.sum(b_q * b_k * b_u[None, :], 1)
        else:
            b_self += tl.sum(b_q * b_k, 1)
        # 5. Add them to A, level by level.
        for i_level in range(LEVELS):
            half = 1 << i_level
            b_factor = _to_middle(b_g, o_c, half, C, BONUS, DTYPE)
            b_level = _dot(b_q * b_factor, tl.trans(b_k * b_factor), DTYPE)
            b_A += tl.where(_rectangles(o_c, half), b_level, 0.0)
    # 6. Put the diagonal into A, and store it.
    b_A = tl.where(o_c[:, None] == o_c[None, :], b_self[:, None], b_A)
    tl.store(p_A + o_out[:, None] * C + o_c[None, :], b_A.to(DTYPE), mask=m_t[:, None])


@triton.jit
def _queries_backward_kernel(
    p_chunks, p_d_since, p_do, p_q, p_k, p_v, p_g, p_bonus, p_dq, p_dk, p_dg, p_d_bonus, scale,
    s_b, s_t, s_h, do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    batch, tokens, heads, shared,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr, BONUS: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    # 1. Find the chunk, batch and head of this program.
    o_first, o_stop, i_n, i_bh = _chunk(p_chunks, batch * heads)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_c, o_start, o_end = tl.arange(0, C), tl.zeros([C], tl.int32), tl.full([C], C, tl.int32)
    o_read = o_c if BONUS else o_c + 1
    o_t = (o_first + o_c).to(tl.int64)
    m_t = (o_first + o_c) < o_stop
    p_d_since += i_b * s_b + i_h * s_h
    p_do += i_b * do_b + i_h * do_h
    p_q += i_b * q_b + (i_h // shared) * q_h
    p_k += i_b * k_b + (i_h // shared) * k_h
    p_v += i_b * v_b + i_h * v_h
    p_g += i_b * g_b + i_h * g_h
    o_out = ((i_b * tokens + o_t) * heads + i_h)[:, None] * K
    DTYPE: tl.constexpr = p_q.dtype.element_ty

    # 2. Compute dA = scale * do v^T and its diagonal, and round dA for products.
    b_dA = tl.zeros([C, C], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_tv = m_t[:, None] & (o_v < V)[None, :]
        b_do = tl.load(p_do + o_t[:, None] * do_t + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_t[:, None] * v_t + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)
        if p_do.dtype.element_ty == DTYPE:
            b_dA += _dot(b_do, tl.trans(b_v), DTYPE)
        else:
            b_do, b_rest, do_unit = factor(b_do, DTYPE)
            b_dA += (_dot(b_do, tl.trans(b_v), DTYPE) + _dot(b_rest, tl.trans(b_v), DTYPE)) * do_unit
    b_dA *= scale
    b_self = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_dA, 0.0), 1)
    b_scores, b_scores_rest, unit = factor(b_dA, DTYPE)

    for i_k in range(0, K, BK):
        # 3. Load BK channels of the decays, queries and keys.
        o_k = i_k + tl.arange(0, BK)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        b_g = tl.load(p_g + o_t[:, None] * g_t + o_k[None, :], mask=m_tk, other=0.0)
        b_q = tl.load(p_q + o_t[:, None] * q_t + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_t[:, None] * k_t + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        # 4. Compute dq_A and dk_A, level by level.
        b_dq = tl.zeros([C, BK], tl.float32)
        b_dk = tl.zeros([C, BK], tl.float32)
        for i_level in range(LEVELS):
            half = 1 << i_level
            b_factor = _to_middle(b_g, o_c, half, C, BONUS, DTYPE)
            b_level = tl.where(_rectangles(o_c, half), b_scores, tl.zeros_like(b_scores))
            b_dq += _dot(b_level, b_k * b_factor, DTYPE) * b_factor
            b_dk += _dot(tl.trans(b_level), b_q * b_factor, DTYPE) * b_factor
            if p_do.dtype.element_ty != DTYPE:
                b_level = tl.where(_rectangles(o_c, half), b_scores_rest, tl.zeros_like(b_scores_rest))
                b_dq += _dot(b_level, b_k * b_factor, DTYPE) * b_factor
                b_dk += _dot(tl.trans(b_level), b_q * b_factor, DTYPE) * b_factor
        b_dq *= unit
        b_dk *= unit
        # 5. Add the part of dq through q_since: exp(P) dq_since.
        b_since = tl.load(p_d_since + o_t[:, None] * s_t + o_k[None, :], mask=m_tk, other=0.0)
        b_dq += _decays(b_g, o_start, o_read, C, DTYPE) * b_since
        # 6. Compute dg and the gradient of the bonus. Then add the diagonal, which does not decay.
        if BONUS:
            b_dg = _sums(b_q * b_dq, o_c + 1, o_end, C, DTYPE)
            b_dg -= _sums(b_k * b_dk, o_c, o_end, C, DTYPE)
            b_u = tl.load(p_bonus + i_h * K + o_k, mask=o_k < K, other=0.0)
            b_du = tl.sum(b_self[:, None] * b_q * b_k, 0)
            tl.store(p_d_bonus + ((i_n * batch + i_b) * heads + i_h) * K + o_k, b_du, mask=o_k < K)
            b_dq += b_self[:, None] * (b_k * b_u[None, :])
            b_dk += b_self[:, None] * (b_q * b_u[None, :])
        else:
            b_dg = _sums(b_q * b_dq - b_k * b_dk, o_c, o_end, C, DTYPE)
            b_dq += b_self[:, None] * b_k
            b_dk += b_self[:, None] * b_q
        # 7. Store the gradients.
        tl.store(p_dg + o_out + o_k[None, :], b_dg, mask=m_tk)
        tl.store(p_dq + o_out + o_k[None, :], b_dq, mask=m_tk)
        tl.store(p_dk + o_out + o_k[None, :], b_dk, mask=m_tk)


def keys_forward(k_BTGK: Tensor, g_BTHK: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Compute k_until_BTHK in the dtype of k, and totals_NBHK in fp32."""
    batch, _, heads, width = g_BTHK.shape
    k, g = rows(k_BTGK), rows(g_BTHK)
    until = k.new_empty(g.shape)
    totals = g.new_empty(len(segments.chunks), batch, heads, width)
    _launch(_keys_forward_kernel, k, g, segments, (k, g), until, totals)
    return until, totals


def keys_backward(
    dk_until_BTHK: Tensor,
    d_totals_NBHK: Tensor,
    dk_intra_BTHK: Tensor,
    dg_BTHK: Tensor,
    k_BTGK: Tensor,
    g_BTHK: Tensor,
    segments: Segments,
) -> tuple[Tensor, Tensor]:
    """Compute dk_BTHK (of each value head) and dg_BTHK in fp32. Both are added in place to the results of
    `queries_backward`."""
    dk, dg = dk_intra_BTHK, dg_BTHK
    assert dk.stride(-1) == 1 and dg.stride(-1) == 1, "written in place"
    d_until, k, g = rows(dk_until_BTHK), rows(k_BTGK), rows(g_BTHK)
    _launch(_keys_backward_kernel, k, g, segments, (d_until, dk, dg, k, g), d_totals_NBHK.contiguous())
    return dk, dg


def queries_forward(
    q_BTGK: Tensor, k_BTGK: Tensor, g_BTHK: Tensor, bonus_HK: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Compute q_since_BTHK and A_BTHC in the dtype of q. A is 0 where s > t."""
    q, k, g = rows(q_BTGK), rows(k_BTGK), rows(g_BTHK)
    bonus = None if bonus_HK is None else bonus_HK.float().contiguous()
    since = q.new_empty(g.shape)
    A = q.new_empty(*g.shape[:3], segments.chunk)
    constants = {"LEVELS": segments.chunk.bit_length() - 1, "BONUS": bonus is not None}
    _launch(_queries_forward_kernel, k, g, segments, (q, k, g), bonus, since, A, **constants)
    return since, A


def queries_backward(
    dq_since_BTHK: Tensor,
    do_BTHV: Tensor,
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    bonus_HK: Tensor | None,
    scale: float,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute dq_BTHK and dk_intra_BTHK (of each value head), dg_BTHK and d_bonus_HK in fp32. They come from the
    gradients of q_since and, through A, of o. Those of q and the bonus are complete; those of k and g lack the part
    through `keys_forward`."""
    batch, _, heads, width = g_BTHK.shape
    d_since, do, q, k, v, g = (rows(x) for x in (dq_since_BTHK, do_BTHV, q_BTGK, k_BTGK, v_BTHV, g_BTHK))
    bonus = None if bonus_HK is None else bonus_HK.float().contiguous()
    d_bonus = None if bonus is None else g.new_empty(len(segments.chunks), batch, heads, width)
    dq, dk, dg = (g.new_empty(g.shape) for _ in range(3))
    constants = {"LEVELS": segments.chunk.bit_length() - 1, "BONUS": bonus is not None, "V": v.shape[3], "BV": 32}
    strided = d_since, do, q, k, v, g
    _launch(_queries_backward_kernel, k, g, segments, strided, bonus, dq, dk, dg, d_bonus, float(scale), **constants)
    return dq, dk, dg, None if d_bonus is None else d_bonus.sum((0, 1))


def _launch(
    kernel: Any,
    k_BTGK: Tensor,
    g_BTHK: Tensor,
    segments: Segments,
    strided: tuple[Tensor, ...],
    *others: Any,
    **constants: Any,
) -> None:
    """Launch one program per chunk and head. It processes BK key channels at once, as registers allow."""
    batch, tokens, heads, width = g_BTHK.shape
    chunk, role = segments.chunk, kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
    block = tuning.entry(role, width, constants.get("V", width), k_BTGK.dtype, k_BTGK.device)
    assert chunk >= 16 and chunk.bit_count() == 1, "chunks are halved, and are operands of matrix products"
    strides = (stride for x in strided for stride in x.stride()[:3])
    sizes = batch, tokens, heads, heads // k_BTGK.shape[2]
    launch(
        kernel,
        (len(segments.chunks) * batch * heads,),
        *(segments.chunks, *strided, *others, *strides, *sizes),
        num_warps=block.warps,
        num_stages=block.stages,
        K=width,
        C=chunk,
        BK=block.columns,
        **constants,
    )
