"""The chunkwise delta rule on one device, in three phases between which ranks can communicate.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_(t-1) + beta_t k_t v_t^T          o_t = scale * q_t S_t

A token reads the decayed state with its key, and writes the error r_t of that reading back, times beta. With b_t =
beta_t k_t and r_t = v_t - k_t diag(exp(g_t)) S_(t-1), this is S_t = diag(exp(g_t)) S_(t-1) + b_t r_t^T. Take a chunk of
C tokens that H enters. P_t is the sum of g from its start through t, and R_t the sum after t to its end. Then the rows
r solve a triangular system (the WY form):

    L[t,s] = k_t . exp(g_(s+1) + ... + g_t) b_s    (s < t)         r = (I + L)^-1 (v - (exp(P) k) H)
    M[t,s] = q_t . exp(g_(s+1) + ... + g_t) b_s    (s <= t)        o = scale * (M r + (exp(P) q) H)

With w = (I + L)^-1 (exp(P) k) and r0 = (I + L)^-1 v, the chain of states goes from chunk to chunk by

    chain    r = r0 - w H                          H_next = diag(exp(P_C)) H + (exp(R) b)^T r

Phase `states` is the chain from empty states, h and r_h. The columns of an identity go with it, with v = 0: these are
D, the product of transitions from the span's start, and r_D. At the span's end D is the transition of the span. For the
state S_in that enters the span then

    H = h + D S_in          r = r_h + r_D S_in          o = scale * (M r_h + (exp(P) q) h + e S_in)

with e = M r_D + (exp(P) q) D. Phase `intra` is e and the rest of o, and `inter` is the products with S_in. If nothing
is exchanged, phase `intra` is all of these in one walk, with neither D nor e.

A walk goes from block to block of chunks, with bounded temporaries. Decays g are natural logs, at most 0 and at least
`checks.FLOORS`. Everything is in one dtype, fp32 or fp64. Tensors per chunk have the shape [N,BH,...], BH = B*H.

Sources: WY form, DeltaNet (arXiv 2406.06484, section 3.2); with decays, Gated DeltaNet (arXiv 2412.06464, section 3.3)
and Kimi Delta Attention (arXiv 2510.26692, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..phases import AffineState, Gradients, Inputs, Options
from ..pieces import Spans
from .chunks import Block, Chunks, chunks_of
from .tokens import Tokens, empty_states


class Kept(NamedTuple):
    """The tensors of each chunk that backward needs."""

    inverse: Tensor  # (I + L)^-1 [N,BH,C,C]
    M: Tensor  # [N,BH,C,C]
    r: Tensor  # [N,BH,C,V]; after phase 1, r_h and r_D side by side if states are exchanged
    H: Tensor  # [N,BH,K,V]; after phase 1, h and D side by side
    e: Tensor  # [N,BH,C,K]; empty unless states are exchanged

    def of(self, block: Block) -> Kept:
        """View the chunks of a block as [(N B H),...]."""
        return Kept(*(part[block.chunks].flatten(0, 1) for part in self))


class Reading(NamedTuple):
    """The tensors that backward needs after `inter_backward`."""

    do: Tensor
    x: Inputs
    kept: Kept


class OfBlock(NamedTuple):
    """The results of a block from its outputs: the gradients of r and b, and the part of dg."""

    dr: Tensor
    db: Tensor
    dg: Tensor | None


class Local(NamedTuple):
    """The results of `intra_backward`: all gradients, or uninitialised ones and those from the outputs, block by
    block."""

    grads: Gradients
    blocks: list[OfBlock]
    read: Reading


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
        return cls(chunks_of(spans, x.v, x.k.shape[-1]), options), x.to(torch.promote_types(x.v.dtype, torch.float32))

    def states_forward(self, x: Inputs) -> tuple[AffineState | None, Kept]:
        """Compute the WY form of the chunks, and the transitions and states of the spans, as if each began empty."""
        (batch, _, heads, width), key, size = x.v.shape, x.k.shape[-1], self.chunks.blocks[0].chunk
        columns, queries = (width + key, key) if self.options.entered else (width, 0)
        shapes = (size, size), (size, size), (size, columns), (key, columns), (size, queries)
        kept = Kept(*(x.v.new_empty(self.chunks.pieces.count, batch * heads, *shape) for shape in shapes))
        if not self.options.entered:
            return None, kept
        leaving = []
        first = S = torch.cat(
            [empty_states(x), torch.eye(key, dtype=x.k.dtype, device=x.k.device).expand(batch * heads, key, key)], -1
        )
        for block in self.chunks.blocks:
            tokens, own = _Tokens(block, x), kept.of(block)
            tokens.solve(own)
            S = tokens.states(first if block.begins_span else S, own)
            if block.ends_span:
                leaving.append(S)
        spans = torch.stack(leaving).unflatten(1, (batch, heads))
        return AffineState(spans[..., width:], spans[..., :width]), kept

    def intra_forward(self, x: Inputs, work: Kept) -> tuple[Tensor, Kept]:
        """Compute M, e, and the part of o that does not depend on S_in; all of o if nothing is exchanged."""
        o, width, S = torch.empty_like(x.v), x.v.shape[-1], empty_states(x)
        for block in self.chunks.blocks:
            tokens, own = _Tokens(block, x), work.of(block)
            if not self.options.entered:
                tokens.solve(own)
                S = tokens.states(empty_states(x) if block.begins_span else S, own)
            own.M.copy_(tokens.M)
            read = (own.M @ own.r).baddbmm_(tokens.reading, own.H, beta=self.options.scale, alpha=self.options.scale)
            block.store(o, read[..., :width])
            own.e.copy_(read[..., width:])
        return o, work

    def inter_forward(self, x: Inputs, work: Kept, o_intra: Tensor, S_in: Tensor | None) -> tuple[Tensor, Kept]:
        """Complete o, in place, and the states that enter the chunks."""
        if S_in is None:
            return o_intra, work
        width = x.v.shape[-1]
        H, r = (part.new_empty(*part.shape[:-1], width) for part in (work.H, work.r))
        kept = work._replace(r=r, H=H)
        for block in self.chunks.blocks:
            wide, own, S = work.of(block), kept.of(block), S_in[block.span].flatten(0, 1).repeat(block.count, 1, 1)
            torch.baddbmm(wide.H[..., :width], wide.H[..., width:], S, out=own.H)
            torch.baddbmm(wide.r[..., :width], wide.r[..., width:], S, out=own.r)
            block.store(o_intra, torch.baddbmm(block.load(o_intra, x.v.shape[2]), own.e, S))
        return o_intra, kept

    def inter_backward(self, do: Tensor, x: Inputs, saved: Kept, S_in: Tensor | None) -> tuple[Tensor | None, Reading]:
        """Compute dS_in, the sum of e^T do."""
        if S_in is None:
            return None, Reading(do, x, saved)
        dS_in = torch.zeros_like(S_in)
        for block in self.chunks.blocks:
            read = saved.of(block).e.mT @ block.load(do, do.shape[2])
            dS_in[block.span] += read.view(block.count, *dS_in.shape[1:]).sum(0)
        return dS_in, Reading(do, x, saved)

    def intra_backward(self, read: Reading) -> tuple[Tensor, None, Local]:
        """Compute dq, and the part of the other gradients from the outputs, block by block; all gradients if nothing is
        exchanged."""
        (do, x, kept), dq, grads, blocks = read, torch.empty_like(read.x.q), _gradients(read.x), []
        dS = empty_states(x)
        for block in reversed(self.chunks.blocks):
            tokens, own, do_ = _Tokens(block, x), kept.of(block), block.load(do, do.shape[2]) * self.options.scale
            dq_, of_block = tokens.outputs_backward(do_, own)
            block.store(dq, dq_)
            if self.options.entered:
                blocks.append(of_block)
            else:
                dS = self._store(grads, tokens, own, of_block, do_, empty_states(x) if block.ends_span else dS)
        return dq, None, Local(grads, blocks, read)

    def states_backward(self, local: Local, dS_out: Tensor | None) -> Gradients:
        """Compute the gradients of k, v, beta and g. This empties `local.blocks`.

        dS_out already includes every later span. The transition of a span therefore needs no gradient of its own.
        """
        grads, blocks, (do, x, kept) = local
        for block in reversed(self.chunks.blocks if blocks else ()):
            tokens, do_ = _Tokens(block, x), block.load(do, do.shape[2]) * self.options.scale
            if block.ends_span:
                dS = empty_states(x) if dS_out is None else dS_out[block.span].flatten(0, 1)
            dS = self._store(grads, tokens, kept.of(block), blocks.pop(0), do_, dS)
        return grads

    def _store(self, grads: Gradients, tokens: _Tokens, own: Kept, of_block: OfBlock, do: Tensor, dS: Tensor) -> Tensor:
        """Store the gradients of a block, for dS of the state that leaves it; return that of the state that enters."""
        block = tokens.block
        d_after, dr, dS = tokens.states_backward(do, own, of_block.dr, dS)
        dk, dv, dbeta, dg = tokens.writes_backward(own, of_block, d_after, dr)
        block.store(grads.k, dk)
        block.store(grads.v, dv)
        assert grads.beta is not None
        block.store(grads.beta, dbeta)
        if grads.g is not None and dg is not None:
            block.store(grads.g, dg)
        return dS


class _Tokens(Tokens):
    """The arithmetic on the tokens of a block."""

    @cached_property
    def beta(self) -> Tensor:
        assert self.x.beta is not None
        return self.block.load(self.x.beta, self.heads).unsqueeze(-1)

    @cached_property
    def b(self) -> Tensor:
        """The written keys beta k."""
        return self.beta * self.k

    @cached_property
    def reading_k(self) -> Tensor:
        """The keys exp(P) k, which read the state."""
        return self.decays.since(self.k)

    @cached_property
    def written(self) -> Tensor:
        """The keys exp(R) b, which are written to the state."""
        return self.decays.until(self.b)

    @cached_property
    def M(self) -> Tensor:
        return self.decays.scores(self.q, self.b)

    def solve(self, own: Kept) -> None:
        """Compute (I + L)^-1 and r0."""
        L = self.decays.scores(self.k, self.b)
        identity = torch.eye(L.shape[1], dtype=L.dtype, device=L.device)
        own.inverse.copy_(torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False, unitriangular=True))
        width = self.v.shape[-1]
        torch.bmm(own.inverse, self.v, out=own.r[..., :width])
        own.r[..., width:].zero_()

    def _w(self, own: Kept) -> Tensor:
        return own.inverse @ self.reading_k

    def states(self, S: Tensor, own: Kept) -> Tensor:
        """Compute the states H that enter the chunks, and r in place of r0, for S that enters the block. Returns the
        state after the last chunk."""
        r, w, written, H = map(self.by_chunk, (own.r, self._w(own), self.written.mT, own.H))
        states = [*H.unbind(), torch.empty_like(S)]
        states[0].copy_(S)
        for n, piece in enumerate(self.block.pieces):
            if piece.begins_document:
                states[n].zero_()
            r[n].baddbmm_(w[n], states[n], alpha=-1)
            self.decayed(n, states[n], out=states[n + 1]).baddbmm_(written[n], r[n])
        return states[-1]

    def states_backward(self, do: Tensor, own: Kept, dr: Tensor, dS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the states after the chunks, of r, and of the state that enters the block. dS is that
        of the state that leaves it. dr is given from the outputs alone, and overwritten."""
        read, w, written, dr = map(self.by_chunk, (self.reading.mT @ do, self._w(own).mT, self.written, dr))
        d_after = torch.empty_like(read)
        states = [torch.empty_like(dS), *d_after.unbind()]
        states[-1].copy_(dS)
        for n in reversed(range(self.block.count)):
            dr[n].baddbmm_(written[n], states[n + 1])
            self.decayed(n, states[n + 1], out=states[n], added=read[n]).baddbmm_(w[n], dr[n], alpha=-1)
            if self.block.pieces[n].begins_document:
                states[n].zero_()
        return d_after.flatten(0, 1), dr.flatten(0, 1), states[0]

    def outputs_backward(self, do: Tensor, own: Kept) -> tuple[Tensor, OfBlock]:
        """Return dq, and the other results from the outputs."""
        dq, db, dg = self.decays.backward(do @ own.r.mT, self.q, self.b, self.decays.since(do @ own.H.mT))
        return dq, OfBlock(own.M.mT @ do, db, dg)

    def writes_backward(
        self, own: Kept, of_block: OfBlock, d_after: Tensor, dr: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return dk, dv, dbeta and dg, for the complete gradients of r and of the states after the chunks."""
        # 1. Go back through the triangular system, from the gradient of r to those of v and L.
        dv = own.inverse.mT @ dr
        minus_dL = dv @ own.r.mT
        minus_dL.diagonal(dim1=1, dim2=2).zero_()
        # 2. Go back from L and the state to the reading keys k and the written keys b.
        minus_dk, minus_db, minus_dg = self.decays.backward(minus_dL, self.k, self.b, self.decays.since(dv @ own.H.mT))
        db_until = self.decays.until(own.r @ d_after.mT)
        db = of_block.db.sub_(minus_db).add_(db_until)
        # 3. Sum the parts of dg: from the outputs, from L and exp(P) k, and from exp(R) b and whole chunks.
        dg = self.decays.writes_backward(self.b, db_until, own.H, d_after)
        if dg is not None and minus_dg is not None and of_block.dg is not None:
            dg.sub_(minus_dg).add_(of_block.dg)
        # 4. Split the gradient of b = beta k into those of beta and k.
        return torch.addcmul(minus_dk.neg_(), db, self.beta), dv, (db * self.k).sum(-1), dg


def _gradients(x: Inputs) -> Gradients:
    """Return uninitialised gradients of k, v, g and beta."""
    assert x.beta is not None
    dg = None if x.g is None else torch.empty_like(x.g)
    return Gradients(None, torch.empty_like(x.k), torch.empty_like(x.v), dg, torch.empty_like(x.beta))
