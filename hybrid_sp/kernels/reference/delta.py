"""Chunkwise delta rule on one device, in three phases that a sequence-parallel schedule can come between.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_(t-1) + beta_t k_t v_t^T          o_t = scale * q_t S_t

A token reads the decayed state with its key and writes what it missed there, times beta: with b_t = beta_t k_t and
r_t = v_t - k_t diag(exp(g_t)) S_(t-1), S_t = diag(exp(g_t)) S_(t-1) + b_t r_t^T. In a chunk of C tokens that S enters,
with P_t the sum of g from its start through t and R_t that after t to its end, the rows r solve a triangular system
(the WY form):

    L[t,s] = k_t . exp(g_(s+1) + ... + g_t) b_s    (s < t)         r = (I + L)^-1 (v - (exp(P) k) S)
    M[t,s] = q_t . exp(g_(s+1) + ... + g_t) b_s    (s <= t)        o = scale * ((exp(P) q) S + M r)

So a chunk is an affine map of S with a dense transition A, and its outputs read S with effective queries e. With h_c
the state that enters chunk c if its span began empty, D_c = A_(c-1) ... A_0 over the span's chunks before c (0 once a
document has begun), and S_in the state that enters the span:

    states   w = (I + L)^-1 (exp(P) k)         r0 = (I + L)^-1 v              (r = r0 - w S)
             A = diag(exp(P_C)) - (exp(R) b)^T w             h_(c+1) = A_c h_c + (exp(R) b)^T r0
    intra    e = exp(P) q - M w                o_intra = M r0
    inter    o = scale * (o_intra + e (h_c + D_c S_in))

Each phase is a pair of plain functions, `x_forward` and `x_backward`, that work through blocks of chunks with bounded
temporaries. Decays g are natural logs, at most 0 and at least `checks.FLOORS`. Only sums of g over runs of tokens are
exponentiated, so no exponent is ever positive. Everything is in one dtype, fp32 or fp64. What belongs to chunks is kept
as [N,BH,...], BH = B*H.

Sources: WY form, DeltaNet (arXiv 2406.06484, section 3.2); with decays, Gated DeltaNet (arXiv 2412.06464, section 3.3)
and Kimi Delta Attention (arXiv 2510.26692, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .chunks import Block, Chunks, running_sum
from .scores import scores


class States(NamedTuple):
    """What the first phase gives."""

    h: Tensor  # [N,BH,K,V]
    leaving: Tensor  # states that leave the spans, each beginning empty [s,B,H,K,V]
    transitions: Tensor | None  # of the spans [s,B,H,K,K], if a state may enter them
    D: Tensor | None  # [N,BH,K,K], likewise
    A: Tensor  # [N,BH,K,K]
    inverse: Tensor  # (I + L)^-1 [N,BH,C,C]
    w: Tensor  # [N,BH,C,K]
    r0: Tensor  # [N,BH,C,V]


class _Tokens:
    """The keys k of a block, the written keys b, and the factors by which they decay in their chunk."""

    def __init__(self, block: Block, k: Tensor, beta: Tensor, g: Tensor | None) -> None:
        heads = beta.shape[2]
        self.k, self.beta = block.load(k, heads), block.load(beta, heads).unsqueeze(-1)
        self.b = self.beta * self.k
        g_NC = None if g is None else block.load(g, heads)
        self.scores = scores(g_NC)
        self.vector = g_NC is not None and g_NC.ndim == 3
        self._since = self._until = None
        if g_NC is not None:
            since, until = running_sum(g_NC, "through").exp_(), running_sum(g_NC, "after").exp_()
            self._since, self._until = (x if self.vector else x.unsqueeze(-1) for x in (since, until))

    def since(self, x: Tensor) -> Tensor:
        """exp(P) x: decayed from the chunk's start. May be x itself."""
        return x if self._since is None else self._since * x

    def until(self, x: Tensor) -> Tensor:
        """exp(R) x: decayed to the chunk's end. May be x itself."""
        return x if self._until is None else self._until * x

    @property
    def whole(self) -> Tensor | float:
        """exp(P_C), [(N B H), K or 1]."""
        return 1.0 if self._since is None else self._since[:, -1]

    def decay_gradient(self, d_since: Tensor, d_until: Tensor, d_whole: Tensor) -> Tensor:
        """Gradient of g from (factor * its gradient) per key channel: exp(P), exp(R) [(N B H),C,K], exp(P_C)
        [(N B H),K]."""
        if not self.vector:
            d_since, d_until, d_whole = d_since.sum(-1), d_until.sum(-1), d_whole.sum(-1)
        return running_sum(d_since, "from") + running_sum(d_until, "before") + d_whole.unsqueeze(1)


def states_forward(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, entered: bool, chunks: Chunks) -> States:
    """k [B,T,G,K]; v [B,T,H,V]; beta [B,T,H]; g None | [B,T,H] | [B,T,H,K]; `entered`: a state may enter the spans."""
    batch, _, heads, width = v.shape
    key, size = k.shape[-1], chunks.blocks[0].chunk

    def empty(count: int, *shape: int) -> Tensor:
        return k.new_empty(count, batch * heads, *shape)

    h, leaving = empty(chunks.count, key, width), empty(chunks.spans, key, width)
    D, transitions = (empty(chunks.count, key, key), empty(chunks.spans, key, key)) if entered else (None, None)
    A, inverse = empty(chunks.count, key, key), empty(chunks.count, size, size)
    w, r0 = empty(chunks.count, size, key), empty(chunks.count, size, width)
    for block in chunks:
        tokens = _Tokens(block, k, beta, g)
        A_, inverse_, w_, r0_ = (_of(block, x) for x in (A, inverse, w, r0))
        inverse_.copy_(_inverse(tokens.scores.weights(tokens.k, tokens.b)))
        torch.bmm(inverse_, tokens.since(tokens.k), out=w_)
        torch.bmm(inverse_, block.load(v, heads), out=r0_)
        b_until = tokens.until(tokens.b)
        torch.baddbmm(A_, b_until.mT, w_, beta=0, alpha=-1, out=A_)
        A_.diagonal(dim1=1, dim2=2).add_(tokens.whole)
        added = (b_until.mT @ r0_).view_as(h[block.chunks])
        for n in range(block.first, block.first + block.count):
            if chunks.fresh[n]:
                h[n] = 0
            if (after := chunks.after(n, block.span, h, leaving)) is not None:
                torch.baddbmm(added[n - block.first], A[n], h[n], out=after)
            if D is None or transitions is None:
                continue
            if chunks.fresh[n]:
                D[n] = torch.eye(key, dtype=D.dtype, device=D.device) if chunks.reached[n] else 0
            if (after := chunks.after(n, block.span, D, transitions)) is not None:
                torch.bmm(A[n], D[n], out=after)
    leaving = leaving.unflatten(1, (batch, heads))
    transitions = None if transitions is None else transitions.unflatten(1, (batch, heads))
    return States(h, leaving, transitions, D, A, inverse, w, r0)


def _of(block: Block, x: Tensor) -> Tensor:
    """The block's chunks of x [N,BH,...], as a view [(N B H),...]."""
    return x[block.chunks].flatten(0, 1)


def _inverse(L: Tensor) -> Tensor:
    """(I + L)^-1, of L [N,C,C] what is below the diagonal."""
    identity = torch.eye(L.shape[1], dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False, unitriangular=True)


def intra_forward(
    q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, w: Tensor, r0: Tensor, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """o_intra [B,T,H,V], and the effective queries e [N,BH,C,K], in the place of w."""
    heads = beta.shape[2]
    o_intra = q.new_empty(*beta.shape, r0.shape[-1])
    for block in chunks:
        tokens, q_, w_ = _Tokens(block, k, beta, g), block.load(q, heads), _of(block, w)
        M = tokens.scores.weights(q_, tokens.b)
        block.store(o_intra, M @ _of(block, r0))
        w_.copy_(torch.baddbmm(tokens.since(q_), M, w_, alpha=-1))
    return o_intra, w


def _entering(block: Block, h: Tensor, D: Tensor | None, S_in: Tensor | None) -> Tensor:
    """h_c + D_c S_in for the chunks of a block, [(N B H),K,V]."""
    if D is None or S_in is None:
        return _of(block, h)
    return torch.baddbmm(_of(block, h), _of(block, D), S_in[block.span].flatten(0, 1).repeat(block.count, 1, 1))


def inter_forward(
    o_intra: Tensor, e: Tensor, h: Tensor, D: Tensor | None, S_in: Tensor | None, scale: float, chunks: Chunks
) -> Tensor:
    """o from o_intra, in its place. S_in [s,B,H,K,V], or None where no state enters."""
    heads = o_intra.shape[2]
    for block in chunks:
        o_, entering = block.load(o_intra, heads), _entering(block, h, D, S_in)
        block.store(o_intra, torch.baddbmm(o_, _of(block, e), entering, beta=scale, alpha=scale))
    return o_intra


def inter_backward(
    do: Tensor, e: Tensor, h: Tensor, D: Tensor | None, S_in: Tensor | None, scale: float, chunks: Chunks
) -> tuple[Tensor, Tensor | None]:
    """dh, and what other ranks wait for, dS_in."""
    dh = torch.empty_like(h)
    dS_in = None if S_in is None else torch.zeros_like(S_in)
    for block in chunks:
        dh_ = _of(block, dh)
        torch.baddbmm(dh_, _of(block, e).mT, block.load(do, do.shape[2]), beta=0, alpha=scale, out=dh_)
        if D is not None and dS_in is not None:
            passed = (_of(block, D).mT @ dh_).unflatten(0, (block.count, *dS_in.shape[1:3]))
            dS_in[block.span] += passed.sum(0)
    return dh, dS_in


class Local(NamedTuple):
    """Of a block, what `intra_backward` hands to `states_backward`: S that enters its chunks, r, and what its outputs
    give to the gradients of r, of b, of g within the chunk, and of exp(P) (times exp(P), per key channel)."""

    S: Tensor
    r: Tensor
    dr: Tensor
    db: Tensor
    dg: Tensor | None
    d_since: Tensor


def intra_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    h: Tensor,
    D: Tensor | None,
    inverse: Tensor,
    S_in: Tensor | None,
    scale: float,
    chunks: Chunks,
) -> tuple[Tensor, list[Local]]:
    """All that needs no other rank's gradient: dq, and what the outputs give to the others, block by block."""
    heads, dq, local = v.shape[2], torch.empty_like(q), []
    for block in chunks:
        tokens, q_, do_ = _Tokens(block, k, beta, g), block.load(q, heads), block.load(do, heads) * scale
        S = _entering(block, h, D, S_in)
        r = _of(block, inverse) @ torch.baddbmm(block.load(v, heads), tokens.since(tokens.k), S, alpha=-1)
        M = tokens.scores.weights(q_, tokens.b)
        dr = M.mT @ do_
        dq_, db, dg = tokens.scores.backward(do_ @ r.mT, q_, tokens.b, M)
        dq_since = tokens.since(do_ @ S.mT)
        block.store(dq, dq_.add_(dq_since))
        local.append(Local(S, r, dr, db, dg, dq_since.mul_(q_)))
    return dq, local


def states_backward(
    dh: Tensor,
    d_leaving: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A: Tensor,
    inverse: Tensor,
    local: list[Local],
    chunks: Chunks,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of k, v, beta and g, from what the outputs give: dh, to the states that enter the chunks, and `local`,
    which is used up. d_leaving [s,B,H,K,V] holds the gradients of the states that leave the spans in the whole
    sequence; with them a span's own chain of chunks gives all, and its transition needs no gradient."""
    dk, dv, dbeta = torch.empty_like(k), torch.empty_like(v), torch.empty_like(beta)
    dg = None if g is None else torch.empty_like(g)
    d_before = torch.zeros_like(dh[0])  # gradient of the state before the block that comes next
    for block in reversed(chunks):
        tokens, own = _Tokens(block, k, beta, g), local.pop()
        dS = torch.empty_like(dh[block.chunks])  # gradients of the states after each chunk
        if block.first + block.count < chunks.bounds[block.span + 1]:
            dS[-1] = d_before
        else:
            dS[-1] = 0 if d_leaving is None else d_leaving[block.span].flatten(0, 1)
        for n in reversed(range(block.count)):
            before = dS[n - 1] if n else d_before
            if chunks.fresh[block.first + n]:
                before.zero_()
            else:
                torch.baddbmm(dh[block.first + n], A[block.first + n].mT, dS[n], out=before)
        dS = dS.flatten(0, 1)
        dr = own.dr.baddbmm_(tokens.until(tokens.b), dS)
        dv_ = _of(block, inverse).mT @ dr
        block.store(dv, dv_)
        L = tokens.scores.weights(tokens.k, tokens.b)
        dL = -dv_ @ own.r.mT
        dL.diagonal(dim1=1, dim2=2).zero_()
        dk_, db, dg_ = tokens.scores.backward(dL, tokens.k, tokens.b, L)
        dk_since, db_until = tokens.since(dv_ @ own.S.mT), tokens.until(own.r @ dS.mT)
        if dg is not None and dg_ is not None and own.dg is not None:
            d_since = torch.addcmul(own.d_since, dk_since, tokens.k, value=-1)
            d_whole = (own.S * dS).sum(-1) * tokens.whole
            dg_ += tokens.decay_gradient(d_since, db_until * tokens.b, d_whole)
            block.store(dg, dg_.add_(own.dg))
        db = db.add_(own.db).add_(db_until)
        block.store(dbeta, (db * tokens.k).sum(-1))
        block.store(dk, dk_.sub_(dk_since).addcmul_(db, tokens.beta))
    return dk, dv, dbeta, dg


@dataclass(frozen=True)
class Phases:
    """The arithmetic of one call. `entered`: a state may enter the spans, or somebody reads their summaries."""

    chunks: Chunks
    scale: float
    entered: bool
    q_in_states: ClassVar = False

    def states_forward(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None
    ) -> tuple[States, tuple[Tensor | None, ...]]:
        states = states_forward(k, v, beta, g, self.entered, self.chunks)
        return states, (k, v, beta, g, states.A, states.inverse)

    def intra_forward(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, states: Sequence[Any]
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        h, _, _, D, _, inverse, w, r0 = states
        o_intra, e = intra_forward(q, k, beta, g, w, r0, self.chunks)
        return o_intra, e, (q, k, v, beta, g, h, D, inverse)

    def inter_forward(
        self, o_intra: Tensor, e: Tensor, states: Sequence[Any], S_in: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        h, _, _, D, *_ = states
        return inter_forward(o_intra, e, h, D, S_in, self.scale, self.chunks), (e, h, D, S_in)

    def inter_backward(self, do: Tensor, saved: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        e, h, D, S_in = saved
        return inter_backward(do, e, h, D, S_in, self.scale, self.chunks)

    def intra_backward(self, do: Tensor, saved: Sequence[Any], S_in: Tensor | None) -> tuple[Tensor, list[Local]]:
        q, k, v, beta, g, h, D, inverse = saved
        return intra_backward(do, q, k, v, beta, g, h, D, inverse, S_in, self.scale, self.chunks)

    def states_backward(
        self, dh: Tensor, d_leaving: Tensor | None, saved: Sequence[Any], local: list[Local]
    ) -> tuple[None, Tensor, Tensor, Tensor, Tensor | None]:
        k, v, beta, g, A, inverse = saved
        return None, *states_backward(dh, d_leaving, k, v, beta, g, A, inverse, local, self.chunks)
