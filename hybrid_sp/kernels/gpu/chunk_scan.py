"""The scan over chunks of linear attention. One kernel computes o, dq, dk and dv; two more, the states of segments.

P_t is the sum of log decays from a chunk's start through t, R_t the sum after t to its end, and a the sum over the
whole chunk. Over the chunks of a segment, the scan forward is

    out_t = read * (sum over s <= t in the chunk of write * exp(P_t - P_s) (x_t . y_s) z_s + exp(P_t) x_t S)
    S    <- exp(a) S + sum over s in the chunk of write * y_s^T exp(R_s) z_s

The reverse scan goes from the last chunk to the first, with s >= t and exp(P_s - P_t), and with P and R exchanged
outside the sum over pairs. S_in is the state entering a segment, and dS_out the gradient of the state leaving it:

    o    forward     x, y, z = q, k, v        S = S_in         read = scale
    dq   forward     x, y, z = do, v, k       S = S_in^T       read = scale
    dv   reverse     x, y, z = k, q, do       S = dS_out       write = scale
    dk   reverse     x, y, z = v, do, q       S = dS_out^T     write = scale

Under decays per key channel (`vector_decay.py`), x, y or z arrive already decayed to an end of their chunk. The scores
of pairs are given, or not asked for. Of the decay only a is left, along the rows of S or along its columns.

The gradient of a scalar decay g_j sums the contributions of all pairs s < j <= t to the output. It sums four kinds of
pairs apart: pairs in j's chunk, pairs that end in it, pairs that begin in it, and pairs that span it. No sum over many
tokens is therefore the difference of two. With r_t = q_t . dq_t, and with i_s the part of k_s . dk_s within the chunk
and e_s the part beyond,

    dg_j = sum over t >= j of (r_t - i_t) + sum over s < j of e_s + exp(a) <S, dS>

where S enters the chunk and dS is the gradient of the state that leaves it. The scan for dq keeps r and S; the scan for
dk computes the sums.

Sums and states are fp32. Factors of a product are rounded to the dtype of the tokens. x or y may be fp32 with 16-bit
tokens, as the gradient of a normalised output is. Then the rounding error is multiplied too, because the contributions
of numerator and denominator to dq and dk nearly cancel.

The scan itself is FLA's and Lightning Attention's (arXiv 2401.04658). All four outputs are one scan because S
treats k and v alike, up to a transpose.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .scalar_decay import AFTER, HIGH, LOW, THROUGH, between
from .segments import COLUMNS, Segments, places


class Decay(NamedTuple):
    """The decay of the state. `totals` are the log decays of chunks: none; one for all of S [N,B,H]; or those of its
    "rows" or "columns", [N,B,H,D] or [N,B,H,W]. `within` are scalar decays within chunks (`scalar_decay.py`)."""

    kind: str = "none"  # scalar, rows, columns
    totals: Tensor | None = None
    within: Tensor | None = None

    @property
    def mT(self) -> Decay:
        """Return the decay of the transposed state."""
        return self._replace(kind={"rows": "columns", "columns": "rows"}.get(self.kind, self.kind))


@triton.jit
def factor(b_x, DTYPE: tl.constexpr):
    """Prepare fp32 numbers as a factor of a matrix product. Return them rounded, the rounding error, and the number to
    multiply the product by. fp16 has too few exponents for a state, so its factors are scaled."""
    unit = 1.0
    if DTYPE.is_fp16():
        largest = tl.max(tl.abs(b_x))
        unit = tl.where(largest > 0.0, largest, 1.0)
        b_x = b_x / unit
    b_rounded = b_x.to(DTYPE)
    return b_rounded, (b_x - b_rounded.to(tl.float32)).to(DTYPE), unit


@triton.jit
def scan_kernel(
    p_x,
    p_y,
    p_z,
    p_decay,  # log decays of chunks [N,B,H], [N,B,H,D] or [N,B,H,W]
    p_within,  # scalar decays within chunks [B,H,4,T]
    p_scores,  # given pairs: [B,T,H,C], of token t the pairs with s <= t, and 0 for others
    p_S,  # states that enter the scan, one per segment
    p_add,  # fp32, added to out
    p_out,
    p_w,  # GATE: q in the scan for dq, k in that for dk
    p_r,  # GATE: r_t of every tile, [tiles,B,T,H]
    p_states,  # GATE: states that enter the chunks in the scan for dq [N,B,H,D,W]
    p_dg,  # GATE, in reverse: dg of every tile [tiles,B,T,H], or the gradients of the chunks' decays [N,B,H,W]
    p_table,
    read,
    write,
    B,
    T,
    H,
    D,
    W,
    R_xy,  # heads of out that share one head of x and y
    R_z,  # and one head of z and w
    s_xb,
    s_xt,
    s_xh,
    s_yb,
    s_yt,
    s_yh,
    s_zb,
    s_zt,
    s_zh,
    s_S,
    s_Sd,
    s_Sw,
    s_ab,
    s_at,
    s_ah,
    s_ob,
    s_ot,
    s_oh,
    s_wb,
    s_wt,
    s_wh,
    s_c,  # of the log decays, from head to head
    s_states,  # of the states, from chunk to chunk, and then from row to row
    s_states_d,
    C: tl.constexpr,
    BD: tl.constexpr,
    BW: tl.constexpr,
    STRIDE: tl.constexpr,
    DECAY: tl.constexpr,
    PAIRS: tl.constexpr,
    UPDATE: tl.constexpr,
    REVERSE: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    SPLIT_X: tl.constexpr,
    SPLIT_Y: tl.constexpr,
    SPLIT_Z: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 1. Find the columns, batch, head and segment of this program, and load the state that enters the segment.
    i_w, i_bh, i_s = places(tl.cdiv(W, BW), B * H)
    i_b, i_h = i_bh // H, i_bh % H
    start = tl.load(p_table + i_s * STRIDE).to(tl.int64)
    stop = tl.load(p_table + i_s * STRIDE + 1).to(tl.int64)
    first = tl.load(p_table + i_s * STRIDE + 2).to(tl.int64)
    count = tl.cdiv(stop - start, C).to(tl.int32)

    o_c, o_d, o_w = tl.arange(0, C), tl.arange(0, BD), i_w * BW + tl.arange(0, BW)
    m_d, m_w = o_d < D, o_w < W
    p_x += i_b * s_xb + (i_h // R_xy) * s_xh
    p_y += i_b * s_yb + (i_h // R_xy) * s_yh
    p_z += i_b * s_zb + (i_h // R_z) * s_zh
    p_out += i_b * s_ob + i_h * s_oh
    p_within += i_bh * 4 * T + o_c
    if ADD:
        p_add += i_b * s_ab + i_h * s_ah
    if GATE:
        p_w += i_b * s_wb + (i_h // R_z) * s_wh
    o_state = o_d[:, None] * s_Sd + o_w[None, :] * s_Sw
    m_state = m_d[:, None] & m_w[None, :]
    b_S = tl.load(p_S + (i_s * B * H + i_bh) * s_S + o_state, mask=m_state, other=0.0)
    if REVERSE:
        m_pairs = o_c[:, None] <= o_c[None, :]
    else:
        m_pairs = o_c[:, None] >= o_c[None, :]

    for i in tl.range(0, count, num_stages=STAGES):
        # 2. Load x and the decays of the chunk.
        i_n = (count - 1 - i) if REVERSE else i
        n = (first + i_n) * B * H + i_bh
        t = start + i_n * C
        m_t = o_c < stop - t
        m_x, m_z = m_t[:, None] & m_d[None, :], m_t[:, None] & m_w[None, :]
        b_x = tl.load(p_x + t * s_xt + (o_c[:, None] * s_xt + o_d[None, :]), mask=m_x, other=0.0)
        x_unit, y_unit, z_unit = 1.0, 1.0, 1.0
        if SPLIT_X:
            b_x, b_x_rest, x_unit = factor(b_x, DTYPE)
        b_x = b_x.to(DTYPE)
        if DECAY == "scalar":
            b_read = tl.load(p_within + ((AFTER if REVERSE else THROUGH) * T + t), mask=m_t, other=0.0)
            b_decay = tl.exp(tl.load(p_decay + n * s_c + tl.arange(0, 1)))

        # 3. GATE: in the scan for dq, store the state that enters the chunk. In the scan for dk, multiply it with the
        # gradient of the state that leaves it, which counts the pairs that span the chunk.
        if GATE:
            p_chunk = p_states + n * s_states + (o_d[:, None] * s_states_d + o_w[None, :])
            if REVERSE:
                b_spanning = tl.load(p_chunk, mask=m_state, other=0.0).to(tl.float32) * b_S
                if DECAY == "scalar":
                    b_whole = tl.sum(tl.sum(b_spanning, 1), 0) * b_decay
                else:
                    b_total = tl.load(p_decay + n * s_c + o_w, mask=m_w, other=0.0)
                    tl.store(p_dg + n * s_c + o_w, tl.sum(b_spanning, 0) * tl.exp(b_total), mask=m_w)
            else:
                tl.store(p_chunk, b_S.to(p_states.dtype.element_ty), mask=m_state)

        # 4. Compute or load the scores of pairs within the chunk.
        if UPDATE or PAIRS == "computed":
            b_y = tl.load(p_y + t * s_yt + (o_c[:, None] * s_yt + o_d[None, :]), mask=m_x, other=0.0)
            if SPLIT_Y:
                b_y, b_y_rest, y_unit = factor(b_y, DTYPE)
            b_y = b_y.to(DTYPE)
        if PAIRS == "computed":
            b_pairs = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
            if SPLIT_X:
                b_pairs += tl.dot(b_x_rest, tl.trans(b_y), input_precision=PRECISION)
            if SPLIT_Y:
                b_pairs += tl.dot(b_x, tl.trans(b_y_rest), input_precision=PRECISION)
            b_pairs *= x_unit * y_unit * read * write
            if DECAY == "scalar":
                b_high = tl.load(p_within + (HIGH * T + t), mask=m_t, other=0.0)
                b_low = tl.load(p_within + (LOW * T + t), mask=m_t, other=0.0)
                b_pairs *= between(b_high, b_low, REVERSE)
            b_pairs, b_pairs_rest, unit = factor(tl.where(m_pairs, b_pairs, 0.0), DTYPE)
        if PAIRS == "given":
            p_pairs, unit = p_scores + ((i_b * T + t) * H + i_h) * C, read * write
            if REVERSE:
                b_pairs = tl.load(p_pairs + (o_c[None, :] * (H * C) + o_c[:, None]), mask=m_t[None, :], other=0.0)
            else:
                b_pairs = tl.load(p_pairs + (o_c[:, None] * (H * C) + o_c[None, :]), mask=m_t[:, None], other=0.0)

        # 5. Compute the output: read the state that enters the chunk, and add the pairs.
        b_factor, b_rest, state_unit = factor(b_S, DTYPE)
        b_out = tl.dot(b_x, b_factor, input_precision=PRECISION)
        if SPLIT_X:
            b_out += tl.dot(b_x_rest, b_factor, input_precision=PRECISION)
            b_out += tl.dot(b_x, b_rest, input_precision=PRECISION)
        b_out *= x_unit * state_unit * read
        if DECAY == "scalar":
            b_out *= b_read[:, None]
        if GATE and DECAY == "scalar":
            b_w = tl.load(p_w + t * s_wt + (o_c[:, None] * s_wt + o_w[None, :]), mask=m_z, other=0.0).to(tl.float32)
            b_e = tl.sum(b_w * b_out, 1)
        if UPDATE or PAIRS != "none":
            b_z = tl.load(p_z + t * s_zt + (o_c[:, None] * s_zt + o_w[None, :]), mask=m_z, other=0.0)
            if SPLIT_Z:
                b_z, _, z_unit = factor(b_z, DTYPE)
            b_z = b_z.to(DTYPE)
        if PAIRS != "none":
            b_within = tl.dot(b_pairs, b_z, input_precision=PRECISION)
            if (SPLIT_X or SPLIT_Y) and PAIRS == "computed":
                b_within += tl.dot(b_pairs_rest, b_z, input_precision=PRECISION)
            b_within *= unit * z_unit
            b_out += b_within

        # 6. GATE, scalar decays: store r_t, or sum dg from all kinds of pairs.
        if GATE and DECAY == "scalar":
            p_here = p_r + ((i_w * B + i_b) * T + t) * H + i_h + o_c * H
            b_i = tl.sum(b_w * b_within, 1)
            if REVERSE:
                b_r = tl.load(p_here, mask=m_t, other=0.0)
                b_dg = tl.cumsum(b_r - b_i, 0, reverse=True) + (tl.cumsum(b_e, 0) - b_e) + b_whole
                tl.store(p_dg + ((i_w * B + i_b) * T + t) * H + i_h + o_c * H, b_dg, mask=m_t)
            else:
                tl.store(p_here, b_e + b_i, mask=m_t)

        # 7. Store the output.
        if ADD:
            b_out += tl.load(p_add + t * s_at + (o_c[:, None] * s_at + o_w[None, :]), mask=m_z, other=0.0)
        tl.store(p_out + t * s_ot + (o_c[:, None] * s_ot + o_w[None, :]), b_out.to(p_out.dtype.element_ty), mask=m_z)

        # 8. Decay the state over the chunk, and write the chunk into it.
        if DECAY == "scalar":
            b_S *= b_decay[:, None]
        if DECAY == "rows":
            b_S *= tl.exp(tl.load(p_decay + n * s_c + o_d, mask=m_d, other=0.0))[:, None]
        if DECAY == "columns":
            b_S *= tl.exp(tl.load(p_decay + n * s_c + o_w, mask=m_w, other=0.0))[None, :]
        if UPDATE:
            written = write * y_unit * z_unit
            inside = 1.0 if DTYPE.is_fp16() else written  # fp16 may not hold b_z * written: scale the product
            if DECAY == "scalar":
                b_write = tl.load(p_within + ((THROUGH if REVERSE else AFTER) * T + t), mask=m_t, other=0.0)
                b_z = (b_z.to(tl.float32) * (b_write * inside)[:, None]).to(DTYPE)
            elif REVERSE:
                b_z = (b_z.to(tl.float32) * inside).to(DTYPE)
            if DTYPE.is_fp16():
                b_S += tl.dot(tl.trans(b_y), b_z, input_precision=PRECISION) * written
            else:
                b_S = tl.dot(tl.trans(b_y), b_z, b_S, input_precision=PRECISION)


def scan_chunk(dtype: torch.dtype) -> int:
    """Return the tokens in a chunk. fp32 products without TF32 are computed in registers, which hold fewer tokens."""
    return 64 if dtype.itemsize == 2 else 32


def pieces(width: int, dtype: torch.dtype, split: bool = False) -> list[slice]:
    """Split the columns among launches, as registers allow. A last column after a multiple of 16, as a normaliser has,
    gets its own launch. With fp32 or split factors, every 64 columns get one."""
    whole, *last = column_apart(width)
    widest = 64 if split or dtype.itemsize == 4 else whole.stop
    cuts = [*range(0, whole.stop, widest), whole.stop]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)] + last


def column_apart(width: int) -> list[slice]:
    """Split off a last column after a multiple of 16, as a normaliser has: it would need a tile of its own, and a mask
    for the others."""
    whole = width - 1 if width % 16 == 1 and width > 1 else width
    return [slice(0, whole)] + [slice(whole, width)] * (whole < width)


class DecayGradient:
    """The data that the scans for dq and dk share for the gradient of the decays. Each launch has its own part of r and
    of dg."""

    def __init__(self, S: Tensor, segments: Segments, v: Tensor, do: Tensor, by_channel: bool) -> None:
        """Allocate for scans over v and do, with entering states of the shape S [segments,B,H,D,W]."""
        _, B, H, D, W = S.shape
        dtype, split = v.dtype, do.dtype != v.dtype
        kept = torch.float32 if dtype == torch.float16 else dtype  # fp16 has too few exponents for a state
        self.states = torch.empty(len(segments.chunks), B, H, D, W, dtype=kept, device=S.device)
        launches = [] if by_channel else itertools.product(pieces(W, dtype, split), pieces(D, dtype, split))
        kind = kind_of_scan("computed", "scalar", True, True, split)
        tiles = [triton.cdiv(w.stop - w.start, _tile(d, w, dtype, S.device, kind).columns) for w, d in launches]
        self.r = [S.new_empty(count, B, v.shape[1], H) for count in tiles]
        self.dg: list[Tensor] = []

    def total(self) -> Tensor:
        """Return dg [B,T,H], or the gradients of the chunks' log decays [N,B,H,W]."""
        return torch.cat(self.dg).sum(0)


def _tile(d: slice, w: slice, dtype: torch.dtype, device: torch.device, kind: tuple[str, ...]) -> tuning.Entry:
    """Look up the launch parameters of a scan over states with the rows d and the columns w."""
    return tuning.entry("scan", d.stop - d.start, w.stop - w.start, dtype, device, kind)


def kind_of_scan(pairs: str, decay: str, update: bool, gate: bool, split: bool) -> tuple[str, ...]:
    """Return the words of a scan in the table of launch parameters. Both directions share an entry: the scan for dk
    reads what each tile of the scan for dq has written."""
    words = {"writing": update, "gate": gate, "split": split}
    return pairs, decay, *(word for word, true in words.items() if true)


def types(dtype: torch.dtype) -> dict[str, object]:
    named = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return {"DTYPE": named[dtype], "PRECISION": "ieee"}


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of batch, tokens and heads. The last dim is contiguous."""
    if x is None:
        return 0, 0, 0
    assert x.ndim == 3 or x.stride(3) == 1 or x.shape[3] == 1
    return x.stride(0), x.stride(1), x.stride(2)


def scan(
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    S: Tensor,
    segments: Segments,
    dtype: torch.dtype,
    *,
    out: Tensor,
    decay: Decay,
    pairs: str = "computed",
    scores: Tensor | None = None,
    read: float = 1.0,
    write: float = 1.0,
    reverse: bool = False,
    add: Tensor | None = None,
    gradient: DecayGradient | None = None,
    w: Tensor | None = None,
) -> Tensor:
    """Write out [B,T,H,W] by the scan over x, y [B,T,_,D] and z [B,T,_,W], which the states S [segments,B,H,D,W] enter.

    z         None: nothing is added to the states
    dtype     of matrix products
    pairs     within chunks: "computed" from x and y, "given" as scores [B,T,H,C], or "none"; scores are 0 where s > t
    add       [B,T,H,W] fp32, added to out
    gradient  the scan for dq, with w = q, stores here the data for the gradient of the decays;
              the scan for dk, with w = k, reads them
    """
    B, T, H = out.shape[:3]
    kind, totals, within = decay
    split_x, split_y = x.dtype != dtype, y is not None and y.dtype != dtype
    rows, columns = (pieces(width, dtype, split_x or split_y) for width in S.shape[3:])
    nothing = segments.table  # a placeholder for unused pointers
    by_channel = totals if kind in ("rows", "columns") else None
    before = add
    if gradient is not None and reverse:
        like = gradient.r if by_channel is None else [by_channel.unsqueeze(0)] * len(rows)
        gradient.dg = [torch.empty_like(x) for x in like]
    for i, (wide, tall) in enumerate(itertools.product(columns, rows)):
        first = tall == rows[0]
        here = "none" if z is None or (pairs == "given" and not first) else pairs
        part = totals if by_channel is None else by_channel[..., wide if kind == "columns" else tall]
        S_, out_ = S[..., tall, wide], out[..., wide]
        added = before if not first else None if add is None else add[..., wide]
        if tall != rows[-1]:
            out_ = before = torch.empty_like(out_, dtype=torch.float32)
        states = r = dg = None
        if gradient is not None:
            states = gradient.states[..., tall, wide]
            r = gradient.r[i] if by_channel is None else None
            if reverse:
                dg = gradient.dg[i] if by_channel is None else gradient.dg[i % len(rows)][..., wide]
        tile = _tile(
            tall,
            wide,
            dtype,
            out.device,
            kind_of_scan(here, kind, z is not None, gradient is not None, split_x or split_y),
        )
        y_, z_, w_ = (None if array is None else array[..., d] for array, d in ((y, tall), (z, wide), (w, wide)))
        arrays = (x[..., tall], y_, z_, part, within, scores, S_, added, out_, w_, r, states, dg)
        launch(
            scan_kernel,
            (triton.cdiv(S_.shape[4], tile.columns) * B * H * segments.pieces.count,),
            *(nothing if array is None else array for array in arrays),
            segments.table,
            float(read),  # an int would be compiled in
            float(write),
            B,
            T,
            H,
            S_.shape[3],
            S_.shape[4],
            H // x.shape[2],
            1 if z is None else H // z.shape[2],
            *strides(x),
            *strides(y),
            *strides(z),
            S.stride(2),
            S.stride(3),
            S.stride(4),
            *strides(added),
            *strides(out_),
            *strides(w),
            0 if totals is None else totals.stride(2),
            0 if states is None else states.stride(2),
            0 if states is None else states.stride(3),
            C=segments.chunk,
            BD=tile.rows,
            BW=tile.columns,
            STRIDE=COLUMNS,
            DECAY=kind,
            PAIRS=here,
            UPDATE=z is not None,
            REVERSE=reverse,
            ADD=added is not None,
            GATE=gradient is not None,
            SPLIT_X=split_x,
            SPLIT_Y=split_y,
            SPLIT_Z=z is not None and z.dtype != dtype,
            **types(dtype),
            num_warps=tile.warps,
            STAGES=tile.stages,
            num_stages=tile.stages,
        )
    return out
