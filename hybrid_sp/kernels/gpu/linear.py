"""Linear attention on a CUDA device, in the phases of `kernels/reference/linear.py`, which is its specification.

    states   what leaves each segment, h that enters each, what leaves the spans          (`summary`, `fold`)
    intra    o of this rank's tokens alone, h included                                    (`scan`)
    inter    o += scale * (exp(sum of g since the segment began) q_t) (exp(D) S_in)       (`scan` without tokens)

so that all the work on tokens hides the exchange, and where no state enters a span the last phase is none. Backward,
dS_in is a summary in reverse; dq takes the exchange's time, and dk and dv come after it. D is the log decay from the
start of a span to the segment.

q, k, v are bf16, fp16 or fp32, g fp32. Under decays per key channel tokens come in the form of `vector_decay.py`; a
bonus comes with such decays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..reference.linear import Plan
from . import vector_decay as gates
from .chunk_scan import Decay, Gate, scan, scan_chunk
from .launch import rows
from .segments import Segments, segment
from .state_passing import fold, summary

PADDING = 8  # columns that v is widened by for a normaliser, of which one is used: rows stay aligned


def partition(lengths: Sequence[int], boundaries: Sequence[int], v: Tensor) -> Segments:
    """The segments of spans of these lengths (tokens), cut also where documents begin."""
    return segment(tuple(lengths), v.shape[0] * v.shape[2], tuple(boundaries), scan_chunk(v.dtype), v.device)


class Tokens(NamedTuple):
    """q and k as the scan reads and writes with them, and how states decay along rows [K, V] of S."""

    q: Tensor
    k: Tensor
    scores: Tensor | None
    decay: Decay

    @property
    def pairs(self) -> str:
        return "computed" if self.scores is None else "given"

    @property
    def across(self) -> Decay:
        """How the transposed states decay."""
        return ("columns" if self.decay[0] == "rows" else self.decay[0]), self.decay[1]


def _plain(q: Tensor, k: Tensor, g: Tensor | None) -> Tokens:
    return Tokens(q, k, None, ("none" if g is None else "scalar", g))


def _gated(g: Tensor | None) -> TypeGuard[Tensor]:
    """Whether these are decays per key channel."""
    return g is not None and g.ndim == 4


def states_forward(
    k: Tensor, v: Tensor, g: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """States that enter each segment [segments,B,H,K,V] and leave each span [s,B,H,K,V], every span beginning empty;
    the segments' log decays; and what `gates` made of the keys, kept."""
    segments: Segments = plan.chunks
    B, _, H, V = v.shape
    kept = None
    tokens = _plain(k, rows(k), g)
    if _gated(g):
        kept = gates.keys_forward(k, g, segments)
        tokens = Tokens(k, kept[0], None, ("rows", kept[1]))
    added = v.new_empty(segments.count, B, H, k.shape[3], V, dtype=torch.float32)
    total = summary(tokens.k, rows(v), segments, k.dtype, out=added, decay=tokens.decay)
    h, leaving = fold(added, total, None, segments)
    return h, leaving, total, kept


def intra_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    h: Tensor,
    kept: tuple[Tensor, Tensor] | None,
    plan: Plan,
) -> tuple[Tensor, Tokens | None]:
    """o [B,T,H,V] of this rank's tokens, fp32 if entering states are to be added."""
    segments: Segments = plan.chunks
    tokens = _plain(rows(q), rows(k), g)
    if kept is not None and _gated(g):
        q_since, scores = gates.queries_forward(q, k, g, bonus, segments)
        tokens = Tokens(q_since, kept[0], scores, ("rows", kept[1]))
    o = _empty(v, v.shape[3], torch.float32 if plan.entered else plan.dtype)
    scan(
        tokens.q,
        tokens.k,
        rows(v),
        h,
        segments,
        k.dtype,
        out=o,
        decay=tokens.decay,
        pairs=tokens.pairs,
        scores=tokens.scores,
        read=plan.scale,
    )
    return o, tokens if plan.entered else None


def inter_forward(
    o_intra: Tensor,
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    h: Tensor,
    totals: Tensor | None,
    S_in: Tensor | None,
    kept: Tokens | None,
    plan: Plan,
) -> Tensor:
    """o from o_intra: adds what the states that enter the spans contribute, S_in [s,B,H,K,V]."""
    if S_in is None or kept is None:
        return o_intra
    segments: Segments = plan.chunks
    S = _carried(totals, S_in, segments)
    o = _empty(o_intra, o_intra.shape[3], plan.dtype)
    return scan(
        kept.q, None, None, S, segments, q.dtype, out=o, decay=kept.decay, pairs="none", read=plan.scale, add=o_intra
    )


class Reading(NamedTuple):
    """What `inter_backward` hands to `intra_backward`."""

    do: Tensor  # in its own dtype: autograd hands it on in that of o_intra, fp32 where states enter
    tokens: Tokens
    S_in: Tensor | None


def inter_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    h: Tensor,
    totals: Tensor | None,
    S_in: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor | None, Reading]:
    """What other ranks wait for, dS_in; and of each segment alone, the gradient dh of the state that enters it."""
    segments: Segments = plan.chunks
    do, tokens = rows(do), _plain(rows(q), rows(k), g)
    if _gated(g):
        q_since, scores = gates.queries_forward(q, k, g, bonus, segments)
        k_until, chunk_totals = gates.keys_forward(k, g, segments)
        tokens = Tokens(q_since, k_until, scores, ("rows", chunk_totals))
    dh = torch.empty_like(h)
    summary(tokens.q, do, segments, q.dtype, out=dh, decay=tokens.decay, write=plan.scale, reverse=True)
    dS_in = None if S_in is None else fold(dh, totals, None, segments, reverse=True)[1]
    return dh, dS_in, Reading(do, tokens, S_in)


class Kept(NamedTuple):
    """What `intra_backward` hands to `states_backward`."""

    do: Tensor
    tokens: Tokens
    gate: Gate | None
    dk: Tensor | None  # under decays per key channel: what pairs within a chunk give to k
    dg: Tensor | None  # and q and these pairs to g


def intra_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    h: Tensor,
    totals: Tensor | None,
    kept: Reading,
    plan: Plan,
) -> tuple[Tensor, Tensor | None, Kept]:
    """dq and the gradient of the bonus, whole."""
    segments: Segments = plan.chunks
    do, tokens, v, q = kept.do, kept.tokens, rows(v), rows(q)
    S = (h if kept.S_in is None else h + _carried(totals, kept.S_in, segments)).mT
    gate = Gate(S, segments, v, do, _gated(g)) if plan.gated else None
    dq = scan(
        do,
        v,
        tokens.k,
        S,
        segments,
        q.dtype,
        out=_empty(v, q.shape[3], _precision(q, v, g)),
        decay=tokens.across,
        pairs="none" if _gated(g) else "computed",
        read=plan.scale,
        gate=gate,
        w=q,
    )
    dk = dg = d_bonus = None
    if _gated(g):
        dq, dk, dg, d_bonus = gates.queries_backward(dq, do, q, k, v, g, bonus, plan.scale, segments)
    return _of_groups(dq, q), d_bonus, Kept(do, tokens, gate, dk, dg)


def states_backward(
    dh: Tensor,
    d_leaving: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    h: Tensor,
    totals: Tensor | None,
    kept: Kept,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk, dv, dg, from dh and what comes back to the ends of the spans, d_leaving [s,B,H,K,V]."""
    segments: Segments = plan.chunks
    (do, tokens, gate, dk_pairs, dg), v = kept, rows(v)
    dS, _ = fold(dh, totals, d_leaving, segments, reverse=True)
    dv = scan(
        tokens.k,
        tokens.q,
        do,
        dS,
        segments,
        k.dtype,
        out=_empty(v, v.shape[3], v.dtype),
        decay=tokens.decay,
        pairs=tokens.pairs,
        scores=tokens.scores,
        write=plan.scale,
        reverse=True,
    )
    dk = scan(
        v,
        do,
        tokens.q,
        dS.mT,
        segments,
        k.dtype,
        out=_empty(v, k.shape[3], _precision(k, v, g)),
        decay=tokens.across,
        pairs="none" if _gated(g) else "computed",
        write=plan.scale,
        reverse=True,
        gate=gate,
        w=rows(k),
    )
    d_decay = None if gate is None else gate.decay_gradient()
    if _gated(g) and tokens.decay[1] is not None and dk_pairs is not None and dg is not None:
        d_totals = torch.zeros_like(tokens.decay[1]) if d_decay is None else d_decay
        dk, d_decay = gates.keys_backward(dk, d_totals, dk_pairs, dg, k, g, segments)
    return _of_groups(dk, k), dv, d_decay if plan.gated else None


def _precision(key: Tensor, v: Tensor, g: Tensor | None) -> torch.dtype:
    """Of gradients of q and k: fp32 while there is something to be added."""
    return torch.float32 if _gated(g) or key.shape[2] != v.shape[2] else key.dtype


def _empty(like_BTHV: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[B,T,H,width], contiguous but for the normaliser's column, beside which rows stay aligned; not a view, which
    autograd would not let a later phase write into."""
    B, T, H, _ = like_BTHV.shape
    padded = width - 1 + PADDING if width % 16 == 1 and width > 1 else width
    return like_BTHV.new_empty_strided((B, T, H, width), (T * H * padded, H * padded, padded, 1), dtype=dtype)


def _of_groups(x: Tensor, like_BTGK: Tensor) -> Tensor:
    """Gradients of value heads [B,T,H,K] summed over those that share a key head."""
    G = like_BTGK.shape[2]
    return (x if x.shape[2] == G else x.unflatten(2, (G, -1)).sum(3)).to(like_BTGK.dtype)


def _carried(totals: Tensor | None, S_in: Tensor, segments: Segments) -> Tensor:
    """exp(D) S_in of each segment [segments,B,H,K,V]; 0 where a document has begun between."""
    spans = []
    for span in range(segments.spans):
        here = segments.of_span(span)
        S = S_in[span].expand(here.stop - here.start, *S_in.shape[1:])
        if totals is not None:
            since = torch.zeros_like(totals[here])
            since[1:] = totals[here][:-1].cumsum(0)
            factor = since.exp().unsqueeze(-1)
            S = (factor if factor.ndim == 5 else factor.unsqueeze(-1)) * S
        spans.append(S)
    carried = torch.cat(spans)
    if segments.cut_off is not None:
        carried = carried.masked_fill(segments.cut_off.view(-1, 1, 1, 1, 1), 0.0)
    return carried
