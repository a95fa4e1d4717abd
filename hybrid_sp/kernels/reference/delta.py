"""The chunkwise delta rule on one device, in three phases between which ranks can communicate.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_(t-1) + beta_t k_t v_t^T          o_t = scale * q_t S_t

A token reads the decayed state with its key, and writes the error r_t of that reading back, times beta. With b_t =
beta_t k_t and r_t = v_t - k_t diag(exp(g_t)) S_(t-1), this is S_t = diag(exp(g_t)) S_(t-1) + b_t r_t^T. Take a chunk of
C tokens that S enters. P_t is the sum of g from its start through t, and R_t the sum after t to its end. Then the rows
r solve a triangular system (the WY form):

    L[t,s] = k_t . exp(g_(s+1) + ... + g_t) b_s    (s < t)         r = (I + L)^-1 (v - (exp(P) k) S)
    M[t,s] = q_t . exp(g_(s+1) + ... + g_t) b_s    (s <= t)        o = scale * ((exp(P) q) S + M r)

A chunk is therefore an affine map of S with a dense transition A, and its outputs read S with effective queries e. h_c
is the state that enters chunk c if its span began empty, and S_in the state that enters the span. D_c = A_(c-1) ... A_0
runs over the span's chunks before c, and is 0 once a document has begun.

    states   w = (I + L)^-1 (exp(P) k)         r0 = (I + L)^-1 v              (r = r0 - w S)
             A = diag(exp(P_C)) - (exp(R) b)^T w             h_(c+1) = A_c h_c + (exp(R) b)^T r0
    intra    e = exp(P) q - M w                o_intra = M r0
    inter    o = scale * (o_intra + e (h_c + D_c S_in))

Each phase works through blocks of chunks with bounded temporaries. Decays g are natural logs, at most 0 and at least
`checks.FLOORS`. Only sums of g over runs of tokens are exponentiated, so no exponent is ever positive. Everything is in
one dtype, fp32 or fp64. Tensors per chunk have the shape [N,BH,...], BH = B*H.

Sources: WY form, DeltaNet (arXiv 2406.06484, section 3.2); with decays, Gated DeltaNet (arXiv 2412.06464, section 3.3)
and Kimi Delta Attention (arXiv 2510.26692, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..phases import AffineState, Gradients, Inputs, Options
from ..pieces import Spans
from .chunks import Block, Chunks, chunks_of, running_sum
from .decay_mask import decay_mask


class States(NamedTuple):
    """The results of the forward pass per chunk. D is None unless a state may enter the spans."""

    h: Tensor  # [N,BH,K,V]
    D: Tensor | None  # [N,BH,K,K]
    A: Tensor  # [N,BH,K,K]
    inverse: Tensor  # (I + L)^-1 [N,BH,C,C]
    e: Tensor  # [N,BH,C,K]; phase 1 stores w here, and phase 2 overwrites it with e
    r0: Tensor | None  # [N,BH,C,V]; no phase after 2 needs it


class _Tokens:
    """The keys k of a block, the written keys b = beta k, and their decay factors within the chunk."""

    def __init__(self, block: Block, k: Tensor, beta: Tensor, g: Tensor | None) -> None:
        heads = beta.shape[2]
        self.k, self.beta = block.load(k, heads), block.load(beta, heads).unsqueeze(-1)
        self.b = self.beta * self.k
        g_NC = None if g is None else block.load(g, heads)
        self.mask = decay_mask(g_NC)
        self.vector = g_NC is not None and g_NC.ndim == 3
        self._since = self._until = None
        if g_NC is not None:
            since, until = running_sum(g_NC, "through").exp_(), running_sum(g_NC, "after").exp_()
            self._since, self._until = (x if self.vector else x.unsqueeze(-1) for x in (since, until))

    def since(self, x: Tensor) -> Tensor:
        """Return exp(P) x, x decayed from the chunk's start. The result may be x itself."""
        return x if self._since is None else self._since * x

    def until(self, x: Tensor) -> Tensor:
        """Return exp(R) x, x decayed to the chunk's end. The result may be x itself."""
        return x if self._until is None else self._until * x

    @property
    def whole(self) -> Tensor | float:
        """The decay exp(P_C) of the whole chunk, [(N B H), K or 1]."""
        return 1.0 if self._since is None else self._since[:, -1]

    def decay_gradient(self, d_since: Tensor, d_until: Tensor, d_whole: Tensor) -> Tensor:
        """Return the gradient of g. The arguments are (factor * its gradient) per key channel, for the factors exp(P)
        and exp(R) [(N B H),C,K] and exp(P_C) [(N B H),K]."""
        if not self.vector:
            d_since, d_until, d_whole = d_since.sum(-1), d_until.sum(-1), d_whole.sum(-1)
        return running_sum(d_since, "from") + running_sum(d_until, "before") + d_whole.unsqueeze(1)


class Reading(NamedTuple):
    """The results of `inter_backward`: the gradients of o and of h, and the tensors that `intra_backward` needs."""

    do: Tensor
    dh: Tensor
    x: Inputs
    states: States
    S_in: Tensor | None


class OfBlock(NamedTuple):
    """The intermediate results of a block, from its outputs: S that enters its chunks, r, and gradients. The gradients
    are those of r, of b, of g within the chunk, and of exp(P) (times exp(P), per key channel)."""

    S: Tensor
    r: Tensor
    dr: Tensor
    db: Tensor
    dg: Tensor | None
    d_since: Tensor


class Local(NamedTuple):
    """The results of `intra_backward`: the gradients from the outputs, block by block, the gradient of h, and the
    tensors that `states_backward` needs."""

    blocks: list[OfBlock]
    dh: Tensor
    x: Inputs
    A: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class DeltaPhases:
    """The phases of one call, in torch. See `kernels/phases.py`."""

    chunks: Chunks
    options: Options
    PADDING: ClassVar[int] = 0
    q_in_states: ClassVar[bool] = False

    @classmethod
    def prepare(cls, x: Inputs, spans: Spans, options: Options) -> tuple[DeltaPhases, Inputs]:
        """Convert the inputs to the dtype of states, fp32 or fp64."""
        return cls(chunks_of(spans, x.v), options), x.to(torch.promote_types(x.v.dtype, torch.float32))

    def states_forward(self, x: Inputs) -> tuple[AffineState | None, States]:
        """Compute the WY form of the chunks and the chain of their states, as if every span began empty."""
        _, k, v, g, beta, _ = x
        assert beta is not None
        chunks, pieces = self.chunks, self.chunks.pieces
        batch, _, heads, width = v.shape
        key, size = k.shape[-1], chunks.blocks[0].chunk

        def empty(count: int, *shape: int) -> Tensor:
            return k.new_empty(count, batch * heads, *shape)

        h, leaving = empty(pieces.count, key, width), empty(pieces.spans, key, width)
        D = transitions = None
        if self.options.entered:
            D, transitions = empty(pieces.count, key, key), empty(pieces.spans, key, key)
        A, inverse = empty(pieces.count, key, key), empty(pieces.count, size, size)
        w, r0 = empty(pieces.count, size, key), empty(pieces.count, size, width)
        for block in chunks.blocks:
            tokens = _Tokens(block, k, beta, g)
            A_, inverse_, w_, r0_ = (_of(block, x) for x in (A, inverse, w, r0))
            inverse_.copy_(_inverse(tokens.mask.scores(tokens.k, tokens.b)))
            torch.bmm(inverse_, tokens.since(tokens.k), out=w_)
            torch.bmm(inverse_, block.load(v, heads), out=r0_)
            b_until = tokens.until(tokens.b)
            torch.baddbmm(A_, b_until.mT, w_, beta=0, alpha=-1, out=A_)
            A_.diagonal(dim1=1, dim2=2).add_(tokens.whole)
            added = (b_until.mT @ r0_).view_as(h[block.chunks])
            for n in range(block.first, block.first + block.count):
                if pieces.all[n].fresh:
                    h[n] = 0
                if (after := chunks.after(n, block.span, h, leaving)) is not None:
                    torch.baddbmm(added[n - block.first], A[n], h[n], out=after)
                if D is None or transitions is None:
                    continue
                if pieces.all[n].fresh:
                    D[n] = torch.eye(key, dtype=D.dtype, device=D.device) if pieces.all[n].reached else 0
                if (after := chunks.after(n, block.span, D, transitions)) is not None:
                    torch.bmm(A[n], D[n], out=after)
        summary = None
        if transitions is not None:
            summary = AffineState(*(x.unflatten(1, (batch, heads)) for x in (transitions, leaving)))
        return summary, States(h, D, A, inverse, w, r0)

    def intra_forward(self, x: Inputs, work: States) -> tuple[Tensor, States]:
        """Compute o_intra [B,T,H,V], and the effective queries e [N,BH,C,K] in place of w."""
        q, k, _, g, beta, _ = x
        w, r0 = work.e, work.r0
        assert beta is not None and r0 is not None
        o_intra = q.new_empty(*beta.shape, r0.shape[-1])
        for block in self.chunks.blocks:
            tokens, q_, w_ = _Tokens(block, k, beta, g), block.load(q, beta.shape[2]), _of(block, w)
            M = tokens.mask.scores(q_, tokens.b)
            block.store(o_intra, M @ _of(block, r0))
            w_.copy_(torch.baddbmm(tokens.since(q_), M, w_, alpha=-1))
        return o_intra, work._replace(r0=None)

    def inter_forward(self, x: Inputs, work: States, o_intra: Tensor, S_in: Tensor | None) -> tuple[Tensor, States]:
        """Compute o in place of o_intra."""
        heads, scale = o_intra.shape[2], self.options.scale
        for block in self.chunks.blocks:
            o_, entering = block.load(o_intra, heads), _entering(block, work.h, work.D, S_in)
            block.store(o_intra, torch.baddbmm(o_, _of(block, work.e), entering, beta=scale, alpha=scale))
        return o_intra, work

    def inter_backward(
        self, do: Tensor, x: Inputs, saved: States, S_in: Tensor | None
    ) -> tuple[Tensor | None, Reading]:
        """Compute dS_in, and the gradients dh of the states that enter the chunks."""
        dh = torch.empty_like(saved.h)
        dS_in = None if S_in is None else torch.zeros_like(S_in)
        for block in self.chunks.blocks:
            # 1. Compute the gradient of the state that each chunk reads: dh = scale * e^T do.
            dh_, scale = _of(block, dh), self.options.scale
            torch.baddbmm(dh_, _of(block, saved.e).mT, block.load(do, do.shape[2]), beta=0, alpha=scale, out=dh_)
            # 2. Carry it back to the start of the span: dS_in = sum over c of D_c^T dh_c.
            if saved.D is not None and dS_in is not None:
                passed = (_of(block, saved.D).mT @ dh_).unflatten(0, (block.count, *dS_in.shape[1:3]))
                dS_in[block.span] += passed.sum(0)
        return dS_in, Reading(do, dh, x, saved, S_in)

    def intra_backward(self, read: Reading) -> tuple[Tensor, None, Local]:
        """Compute dq, and the contribution of the outputs to the other gradients, block by block."""
        do, dh, x, states, S_in = read
        q, k, v, g, beta, _ = x
        assert beta is not None
        heads, dq, blocks = v.shape[2], torch.empty_like(q), []
        for block in self.chunks.blocks:
            # 1. Compute again the state that enters each chunk, and r = (I + L)^-1 (v - (exp(P) k) S).
            tokens, q_ = _Tokens(block, k, beta, g), block.load(q, heads)
            do_ = block.load(do, heads) * self.options.scale
            S = _entering(block, states.h, states.D, S_in)
            r = _of(block, states.inverse) @ torch.baddbmm(block.load(v, heads), tokens.since(tokens.k), S, alpha=-1)
            # 2. Pairs of tokens within a chunk give dr, and parts of dq, db and dg.
            M = tokens.mask.scores(q_, tokens.b)
            dr = M.mT @ do_
            dq_, db, dg = tokens.mask.backward(do_ @ r.mT, q_, tokens.b, M)
            # 3. The states that queries read give the rest of dq.
            dq_since = tokens.since(do_ @ S.mT)
            block.store(dq, dq_.add_(dq_since))
            blocks.append(OfBlock(S, r, dr, db, dg, dq_since.mul_(q_)))
        return dq, None, Local(blocks, dh, x, states.A, states.inverse)

    def states_backward(self, local: Local, dS_out: Tensor | None) -> Gradients:
        """Compute the gradients of k, v, beta and g. This empties `local.blocks`.

        dS_out already includes every later span. The transition of a span therefore needs no gradient of its own.
        """
        blocks, dh, (_, k, v, g, beta, _), A, inverse = local
        assert beta is not None
        chunks, pieces = self.chunks, self.chunks.pieces
        dk, dv, dbeta = torch.empty_like(k), torch.empty_like(v), torch.empty_like(beta)
        dg = None if g is None else torch.empty_like(g)
        d_before = torch.zeros_like(dh[0])  # gradient of the state before the block done last
        for block in reversed(chunks.blocks):
            # 1. Compute the gradient of the state after each chunk, from the last chunk of a span to its first.
            tokens, own = _Tokens(block, k, beta, g), blocks.pop()
            dS = torch.empty_like(dh[block.chunks])
            if not chunks.ends_span(block):
                dS[-1] = d_before
            else:
                dS[-1] = 0 if dS_out is None else dS_out[block.span].flatten(0, 1)
            for n in reversed(range(block.count)):
                before = dS[n - 1] if n else d_before
                if pieces.all[block.first + n].fresh:
                    before.zero_()
                else:
                    torch.baddbmm(dh[block.first + n], A[block.first + n].mT, dS[n], out=before)
            # 2. Go back through the triangular system, from the gradient of r to those of v and L.
            dS = dS.flatten(0, 1)
            dr = own.dr.baddbmm_(tokens.until(tokens.b), dS)
            dv_ = _of(block, inverse).mT @ dr
            block.store(dv, dv_)
            L = tokens.mask.scores(tokens.k, tokens.b)
            dL = -dv_ @ own.r.mT
            dL.diagonal(dim1=1, dim2=2).zero_()
            # 3. Go back from L and the state to the reading keys k and the written keys b.
            dk_, db, dg_ = tokens.mask.backward(dL, tokens.k, tokens.b, L)
            dk_since, db_until = tokens.since(dv_ @ own.S.mT), tokens.until(own.r @ dS.mT)
            # 4. Sum the parts of dg through P, through R, through the whole decay of the chunk, and within it.
            if dg is not None and dg_ is not None and own.dg is not None:
                d_since = torch.addcmul(own.d_since, dk_since, tokens.k, value=-1)
                d_whole = (own.S * dS).sum(-1) * tokens.whole
                dg_ += tokens.decay_gradient(d_since, db_until * tokens.b, d_whole)
                block.store(dg, dg_.add_(own.dg))
            # 5. Split the gradient of b = beta k into those of beta and k.
            db = db.add_(own.db).add_(db_until)
            block.store(dbeta, (db * tokens.k).sum(-1))
            block.store(dk, dk_.sub_(dk_since).addcmul_(db, tokens.beta))
        return Gradients(None, dk, dv, dg, dbeta)


def _of(block: Block, x: Tensor) -> Tensor:
    """View the block's chunks of x [N,BH,...] as [(N B H),...]."""
    return x[block.chunks].flatten(0, 1)


def _inverse(L: Tensor) -> Tensor:
    """Return (I + L)^-1. Only the part of L [N,C,C] below the diagonal counts."""
    identity = torch.eye(L.shape[1], dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False, unitriangular=True)


def _entering(block: Block, h: Tensor, D: Tensor | None, S_in: Tensor | None) -> Tensor:
    """Return h_c + D_c S_in for the chunks of a block, [(N B H),K,V]."""
    if D is None or S_in is None:
        return _of(block, h)
    return torch.baddbmm(_of(block, h), _of(block, D), S_in[block.span].flatten(0, 1).repeat(block.count, 1, 1))
