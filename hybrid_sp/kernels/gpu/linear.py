"""The phases of linear attention on a CUDA device. `kernels/reference/linear.py` is the specification.

    states   the state leaving each segment, h entering each, the map of each span        (`summary`, `fold`)
    intra    o of this rank's tokens alone, h included                                    (`scan`)
    inter    o += scale * (exp(sum of g since the segment began) q_t) (exp(D) S_in)       (`scan` without tokens)

D is the log decay from the start of a span to the segment. All per-token work overlaps the exchange, and the last phase
is skipped if no state enters a span. In backward, dS_in is computed first, as a reverse summary, and sent. dq is
computed while it is in flight; dk and dv follow.

q, k, v are bf16, fp16 or fp32, and g is fp32. Under decays per key channel, tokens have the form of `vector_decay.py`.
A bonus is supported only with such decays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..heads import sum_groups
from ..phases import AffineState, Gradients, Inputs, Options
from ..pieces import Spans, span_decays
from . import tuning, vector_decay
from .chunk_scan import Decay, DecayGradient, scan, scan_chunk
from .launch import check_interpreter, rows
from .scalar_decay import decays_within
from .segments import Segments, segment
from .state_passing import carry, fold, summary


class Tokens(NamedTuple):
    """The q and k with which the scan reads and writes, and the decay of states [K, V]."""

    q: Tensor
    k: Tensor
    scores: Tensor | None
    decay: Decay

    @property
    def pairs(self) -> str:
        return "computed" if self.scores is None else "given"


def _by_channel(g: Tensor | None) -> TypeGuard[Tensor]:
    """Tell whether these are decays per key channel."""
    return g is not None and g.ndim == 4


class Work(NamedTuple):
    """The results of a forward phase. h [segments,B,H,K,V] enters the segments if every span begins empty, and totals
    are the segments' log decays. keys are the k with which the scan writes, and the decay; tokens are q and k of phase
    2."""

    h: Tensor
    totals: Tensor | None
    keys: tuple[Tensor, Decay] | None = None
    tokens: Tokens | None = None


class Saved(NamedTuple):
    """The tensors that backward needs from forward. It computes the others again."""

    h: Tensor
    totals: Tensor | None


class Reading(NamedTuple):
    """The results of `inter_backward`, with the tensors that `intra_backward` needs."""

    do: Tensor  # in its own dtype: autograd delivers it in the dtype of o_intra, which is fp32 if states enter
    dh: Tensor
    tokens: Tokens
    x: Inputs
    saved: Saved
    S_in: Tensor | None


class Local(NamedTuple):
    """The results of `intra_backward`, with the tensors that `states_backward` needs."""

    do: Tensor
    dh: Tensor
    tokens: Tokens
    k: Tensor
    v: Tensor
    g: Tensor | None
    totals: Tensor | None
    gradient: DecayGradient | None
    dk: Tensor | None  # under decays per key channel: the part of dk from pairs within a chunk
    dg: Tensor | None  # and the part of dg from q and these pairs


@dataclass(frozen=True)
class LinearPhases:
    """The phases of one call, in Triton. See `kernels/phases.py`.

    gated    whether g needs a gradient
    by_head  ranks exchange one log decay per head, though the phases take one per key channel
    """

    segments: Segments
    options: Options
    gated: bool
    by_head: bool
    PADDING: ClassVar[int] = 16  # rows stay aligned for Triton, which looks for multiples of 16 alone
    q_in_states: ClassVar[bool] = False

    @classmethod
    def prepare(cls, x: Inputs, spans: Spans, options: Options) -> tuple[LinearPhases, Inputs]:
        """Convert decays and bonus to fp32. A bonus is supported only with decays per key channel, so other decays are
        broadcast."""
        g, bonus = (None if part is None else part.float() for part in (x.g, x.bonus))
        by_head = bonus is not None and g is not None and g.ndim == 3
        if bonus is not None and (g is None or g.ndim == 3):
            g = x.v.new_zeros(1, 1, 1, dtype=bonus.dtype) if g is None else g
            g = g.unsqueeze(-1).expand(*x.v.shape[:3], x.k.shape[3])
        if x.v.device.type == "cpu" and (_by_channel(g) or x.v.dtype == torch.bfloat16):
            check_interpreter()
        B, _, H, V = x.v.shape
        programs = tuning.entry("segments", x.k.shape[3], V, x.v.dtype, x.v.device).programs
        segments = segment(spans, B * H, scan_chunk(x.v.dtype), x.v.device, programs)
        return cls(segments, options, g is not None and g.requires_grad, by_head), x._replace(g=g, bonus=bonus)

    def states_forward(self, x: Inputs) -> tuple[AffineState | None, Work]:
        """Compute h that enters the segments, the map S_in -> S_out of each span, and the segments' log decays."""
        B, _, H, V = x.v.shape
        # 1. Sum the log decays of chunks. Under decays per key channel, decay the keys to the end of their chunk.
        k, decay = keys = self._keys(x)
        # 2. Sum the keys and values of each segment to the state that leaves it, if none enters it.
        added = x.v.new_empty(self.segments.pieces.count, B, H, x.k.shape[3], V, dtype=torch.float32)
        totals = summary(k, rows(x.v), self.segments, x.k.dtype, out=added, decay=decay)
        # 3. Fold these along each span into h, the states that enter the segments.
        h, leaving = fold(added, totals, None, self.segments)
        if not self.options.entered:
            return None, Work(h, totals, keys)
        # 4. Sum the decays of each span: with the leaving state they are its map.
        spans = span_decays(totals, self.segments.pieces)
        if self.by_head and spans is not None:
            spans = spans[..., 0]
        return AffineState(spans, leaving), Work(h, totals, keys)

    def intra_forward(self, x: Inputs, work: Work) -> tuple[Tensor, Work]:
        """Compute o [B,T,H,V] of this rank's tokens, in fp32 if entering states are to be added."""
        # 1. Under decays per key channel, decay queries from the start of their chunk, and score pairs.
        tokens = self._tokens(x, work.keys)
        o = _empty(x.v, x.v.shape[3], torch.float32 if self.options.entered else self.options.dtype)
        # 2. The scan for o: forward, x, y, z = q, k, v with the states h.
        scan(
            tokens.q,
            tokens.k,
            rows(x.v),
            work.h,
            self.segments,
            x.k.dtype,
            out=o,
            decay=tokens.decay,
            pairs=tokens.pairs,
            scores=tokens.scores,
            read=self.options.scale,
        )
        return o, work._replace(keys=None, tokens=tokens)

    def inter_forward(self, x: Inputs, work: Work, o_intra: Tensor, S_in: Tensor | None) -> tuple[Tensor, Saved]:
        """Add the contribution of the entering states to o_intra, and return o."""
        saved, tokens = Saved(work.h, work.totals), work.tokens
        if S_in is None or tokens is None:
            return o_intra, saved
        # The scan for o again, without tokens: forward, x = q with the states exp(D) S_in. It adds o_intra.
        o = scan(
            tokens.q,
            None,
            None,
            carry(S_in, work.totals, None, self.segments),
            self.segments,
            x.q.dtype,
            out=_empty(o_intra, o_intra.shape[3], self.options.dtype),
            decay=tokens.decay,
            pairs="none",
            read=self.options.scale,
            add=o_intra,
        )
        return o, saved

    def inter_backward(self, do: Tensor, x: Inputs, saved: Saved, S_in: Tensor | None) -> tuple[Tensor | None, Reading]:
        """Compute dS_in, and the gradient dh of the state that enters each segment, from this segment alone."""
        # 1. Decay queries and keys as in forward. They are not kept.
        do, tokens = _aligned(do), self._tokens(x)
        # 2. Sum the queries and do of each segment to dh: a summary in reverse.
        dh, scale = torch.empty_like(saved.h), self.options.scale
        summary(tokens.q, do, self.segments, x.q.dtype, out=dh, decay=tokens.decay, write=scale, reverse=True)
        # 3. Fold dh along each span, from its last segment to its first, into dS_in.
        dS_in = None if S_in is None else fold(dh, saved.totals, None, self.segments, reverse=True)[1]
        return dS_in, Reading(do, dh, tokens, x, saved, S_in)

    def intra_backward(self, read: Reading) -> tuple[Tensor, Tensor | None, Local]:
        """Compute dq and the gradient of the bonus, both complete."""
        do, dh, tokens, (q, k, v, g, _, bonus), (h, totals), S_in = read
        v, q, by_channel = rows(v), rows(q), _by_channel(g)
        # 1. Transpose the states that enter the segments, with the part of S_in.
        S = (h if S_in is None else carry(S_in, totals, h, self.segments)).mT
        gradient = DecayGradient(S, self.segments, v, do, by_channel) if self.gated else None
        # 2. The scan for dq: forward, x, y, z = do, v, k with the states S^T. It keeps r and S for dg.
        dq = scan(
            do,
            v,
            tokens.k,
            S,
            self.segments,
            q.dtype,
            out=_empty(v, q.shape[3], _precision(q, v, g)),
            decay=tokens.decay.mT,
            pairs="none" if by_channel else "computed",
            read=self.options.scale,
            gradient=gradient,
            w=q,
        )
        # 3. Under decays per key channel, go back from decayed queries and scores to q, k, g and the bonus.
        dk = dg = d_bonus = None
        if _by_channel(g):
            scale = self.options.scale
            dq, dk, dg, d_bonus = vector_decay.queries_backward(dq, do, q, k, v, g, bonus, scale, self.segments)
        dq = sum_groups(dq, q.shape[2]).to(q.dtype)
        return dq, d_bonus, Local(do, dh, tokens, k, v, g, totals, gradient, dk, dg)

    def states_backward(self, local: Local, dS_out: Tensor | None) -> Gradients:
        """Compute dk, dv and dg, from dh and from the gradients dS_out at the ends of the spans."""
        do, dh, tokens, k, v, g, totals, gradient, dk_pairs, dg = local
        v, by_channel = rows(v), _by_channel(g)
        # 1. Fold dS_out and dh, from the last segment of a span to its first, into the gradients of the leaving states.
        dS, _ = fold(dh, totals, dS_out, self.segments, reverse=True)
        # 2. The scan for dv: reverse, x, y, z = k, q, do with the states dS.
        dv = scan(
            tokens.k,
            tokens.q,
            do,
            dS,
            self.segments,
            k.dtype,
            out=_empty(v, v.shape[3], v.dtype),
            decay=tokens.decay,
            pairs=tokens.pairs,
            scores=tokens.scores,
            write=self.options.scale,
            reverse=True,
        )
        # 3. The scan for dk: reverse, x, y, z = v, do, q with the states dS^T. It sums dg.
        dk = scan(
            v,
            do,
            tokens.q,
            dS.mT,
            self.segments,
            k.dtype,
            out=_empty(v, k.shape[3], _precision(k, v, g)),
            decay=tokens.decay.mT,
            pairs="none" if by_channel else "computed",
            write=self.options.scale,
            reverse=True,
            gradient=gradient,
            w=rows(k),
        )
        # 4. Under decays per key channel, go back from decayed keys and whole chunks to k and g.
        d_decay = None if gradient is None else gradient.total()
        if _by_channel(g) and tokens.decay.totals is not None and dk_pairs is not None and dg is not None:
            d_totals = torch.zeros_like(tokens.decay.totals) if d_decay is None else d_decay
            dk, d_decay = vector_decay.keys_backward(dk, d_totals, dk_pairs, dg, k, g, self.segments)
        dk = sum_groups(dk, k.shape[2]).to(k.dtype)
        return Gradients(None, dk, dv, d_decay if self.gated else None)

    def _keys(self, x: Inputs) -> tuple[Tensor, Decay]:
        """Return k with which the scan writes, and the decay."""
        if _by_channel(x.g):
            k_until, totals = vector_decay.keys_forward(x.k, x.g, self.segments)
            return k_until, Decay("rows", totals)
        return rows(x.k), Decay() if x.g is None else Decay("scalar", *decays_within(x.g, self.segments))

    def _tokens(self, x: Inputs, keys: tuple[Tensor, Decay] | None = None) -> Tokens:
        """Return q and k with which the scan reads and writes. `keys` are computed here if they are not given."""
        k, decay = keys or self._keys(x)
        if not _by_channel(x.g):
            return Tokens(rows(x.q), k, None, decay)
        q, scores = vector_decay.queries_forward(x.q, x.k, x.g, x.bonus, self.segments)
        return Tokens(q, k, scores, decay)


def _precision(key: Tensor, v: Tensor, g: Tensor | None) -> torch.dtype:
    """Choose the dtype of the gradient of q or k: fp32 while more is to be added to it."""
    return torch.float32 if _by_channel(g) or key.shape[2] != v.shape[2] else key.dtype


def _aligned(x_BTHV: Tensor) -> Tensor:
    """Return x as kernels read it. What autograd makes for a normaliser's column has no padding, so it is copied."""
    if x_BTHV.shape[3] % 16 == 1 and x_BTHV.stride(2) % 16:
        return _empty(x_BTHV, x_BTHV.shape[3], x_BTHV.dtype).copy_(x_BTHV)
    return rows(x_BTHV)


def _empty(like_BTHV: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Allocate [B,T,H,width], contiguous except for padding after a normaliser's column, which keeps rows aligned. The
    result is not a view, because autograd would not let a later phase write into a view."""
    B, T, H, _ = like_BTHV.shape
    padded = width - 1 + LinearPhases.PADDING if width % 16 == 1 and width > 1 else width
    return like_BTHV.new_empty_strided((B, T, H, width), (T * H * padded, H * padded, padded, 1), dtype=dtype)
