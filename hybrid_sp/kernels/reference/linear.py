"""The chunkwise form of linear attention on one device, in three phases between which ranks can communicate.

    S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T          o_t = scale * q_t S_t

H_c is the state that enters chunk c. P_t is the sum of g from the chunk's start through t, and R_t the sum after t to
the chunk's end.

    chain    H_(c+1) = exp(g summed over c) H_c + sum over t in c of (exp(R_t) k_t) v_t^T
    within   o_t = sum over s <= t of (q_t . exp(g_(s+1) + ... + g_t) k_s) v_s                     (s, t in one chunk)
    read     o_t = scale * (o_t + (exp(P_t) q_t) H_c)

With a bonus u, a token reads the state before it: o_t = scale * q_t (S_(t-1) + diag(u) k_t v_t^T), RWKV-6's form. Then
the sums in `within` and P_t exclude g_t, and the token itself adds (u q_t . k_t) v_t.

Phase `states` is the chain from empty states, and `intra` is `within`. Phase `inter` adds exp(D_c) S_in to H_c, for the
state S_in that enters the span and its log decay D_c up to the chunk, and is `read`. If nothing is exchanged, phase
`intra` is all of these in one walk. It keeps only the states that enter blocks; backward makes the others again.

A walk goes from block to block of chunks, with bounded temporaries. Decays g are natural logs, None | [B,T,H] |
[B,T,H,K], at most 0 and at least `checks.FLOORS`. Everything is in one dtype, fp32 or fp64. This is the reference of
`gpu/linear.py`.

Sources: chunkwise form, GLA (arXiv 2312.06635, section 4) and Mamba-2 (arXiv 2405.21060, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..phases import AffineState, Gradients, Inputs, Options
from ..pieces import Spans, decays_before, over_state, span_decays
from .chunks import Chunks, chunks_of
from .tokens import Tokens, empty_states


class Kept(NamedTuple):
    """The states [...,BH,K,V] that enter the chunks if states are exchanged, else those that enter the blocks. The log
    decays of the chunks are None | [N,B,H] | [N,B,H,K]."""

    states: Tensor
    totals: Tensor | None


class Reading(NamedTuple):
    """The tensors that backward needs after `inter_backward`. If states are exchanged, dh is the part of the gradients
    of H from the outputs of the same chunk."""

    do: Tensor
    x: Inputs
    kept: Kept
    dh: Tensor | None


class Local(NamedTuple):
    """The results of `intra_backward`. If states are exchanged, the gradients lack the part that flows through the
    states after the chunks."""

    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    read: Reading


@dataclass(frozen=True)
class LinearPhases:
    """The phases of one call, in torch. See `kernels/phases.py`."""

    chunks: Chunks
    options: Options
    PADDING: ClassVar[int] = 1
    q_in_states: ClassVar[bool] = False

    @classmethod
    def prepare(cls, x: Inputs, spans: Spans, options: Options) -> tuple[LinearPhases, Inputs]:
        """Convert the inputs to the dtype of states, fp32 or fp64."""
        return cls(chunks_of(spans, x.v, x.k.shape[-1]), options), x.to(torch.promote_types(x.v.dtype, torch.float32))

    def states_forward(self, x: Inputs) -> tuple[AffineState | None, Kept | None]:
        """Compute the states that enter the chunks and leave the spans, as if every span began empty."""
        if not self.options.entered:
            return None, None
        (batch, _, heads, _), S, leaving, totals = x.v.shape, empty_states(x), [], []
        h = S.new_empty(self.chunks.pieces.count, *S.shape)
        for block in self.chunks.blocks:
            tokens = _Tokens(block, x)
            S = tokens.chain(empty_states(x) if block.begins_span else S, h[block.chunks])
            if x.g is not None and tokens.decays.total is not None:
                totals.append(tokens.decays.total.view(block.count, batch, heads, *x.g.shape[3:]))
            if block.ends_span:
                leaving.append(S)
        kept = Kept(h, torch.cat(totals) if totals else None)
        states = torch.stack(leaving).unflatten(1, (batch, heads))
        return AffineState(span_decays(kept.totals, self.chunks.pieces), states), kept

    def intra_forward(self, x: Inputs, work: Kept | None) -> tuple[Tensor, Kept]:
        """Compute the part of o [B,T,H,V] from tokens of the same chunk, before scaling. If nothing is exchanged,
        compute all of o."""
        o, S, entering = torch.empty_like(x.v), empty_states(x), []
        for block in self.chunks.blocks:
            tokens = _Tokens(block, x)
            o_ = tokens.scores @ tokens.v
            if work is None:
                entering.append(empty_states(x) if block.begins_span else S)
                H, S = self._states(tokens, entering[-1])
                o_ = tokens.read(o_, H, self.options.scale)
            block.store(o, o_)
        return o, Kept(torch.stack(entering), None) if work is None else work

    def inter_forward(self, x: Inputs, work: Kept, o_intra: Tensor, S_in: Tensor | None) -> tuple[Tensor, Kept]:
        """Complete the states that enter the chunks. Add to o_intra, in place, the part that tokens read of them, and
        scale the sum to o."""
        if S_in is None:
            return o_intra, work
        before = self._before_chunks(work.totals, S_in)
        for block in self.chunks.blocks:
            tokens, H, S = _Tokens(block, x), work.states[block.chunks], S_in[block.span].flatten(0, 1)
            H.add_(S) if before is None else H.addcmul_(over_state(before[block.chunks]).flatten(1, 2), S)
            block.store(o_intra, tokens.read(block.load(o_intra, tokens.heads), H, self.options.scale))
        return o_intra, work

    def inter_backward(self, do: Tensor, x: Inputs, saved: Kept, S_in: Tensor | None) -> tuple[Tensor | None, Reading]:
        """Compute dh, and dS_in by the chain of dh back to the start of each span, from empty gradients."""
        if S_in is None:
            return None, Reading(do, x, saved, None)
        dh, dS_in, dS = torch.empty_like(saved.states), torch.empty_like(S_in), empty_states(x)
        for block in reversed(self.chunks.blocks):
            tokens, dh_ = _Tokens(block, x), dh[block.chunks]
            dh_.copy_(tokens.read_backward(block.load(do, tokens.heads) * self.options.scale))
            _, dS = tokens.chain_backward(dh_, empty_states(x) if block.ends_span else dS)
            if block.begins_span:
                dS_in[block.span] = dS.view_as(S_in[block.span])
        return dS_in, Reading(do, x, saved, dh)

    def intra_backward(self, read: Reading) -> tuple[Tensor, Tensor | None, Local]:
        """Compute dq and the gradient of the bonus completely, and dk, dv and dg without the part that flows through
        the states after the chunks. If nothing is exchanged, compute all gradients."""
        do, x, kept, dh = read
        dq, dk, dv, dS = torch.empty_like(x.q), torch.empty_like(x.k), torch.empty_like(x.v), empty_states(x)
        dg = None if x.g is None else torch.empty_like(x.g)
        d_bonus = None if x.bonus is None else torch.zeros_like(x.bonus)
        for n, block in reversed(list(enumerate(self.chunks.blocks))):
            tokens, do_ = _Tokens(block, x), block.load(do, x.v.shape[2]) * self.options.scale
            H = kept.states[block.chunks] if dh is not None else self._states(tokens, kept.states[n])[0]
            dq_, dk_, dv_, dg_ = tokens.outputs_backward(do_, H, d_bonus)
            if dh is None and H is not None:
                d_after, dS = tokens.chain_backward(
                    tokens.read_backward(do_), empty_states(x) if block.ends_span else dS
                )
                dk_through, dv_through, dg_through = tokens.writes_backward(H, d_after)
                dk_, dv_ = dk_.add_(dk_through), dv_.add_(dv_through)
                dg_ = None if dg_ is None or dg_through is None else dg_.add_(dg_through)
            block.store(dq, dq_)
            block.store(dk, dk_)
            block.store(dv, dv_)
            if dg is not None and dg_ is not None:
                block.store(dg, dg_)
        return dq, d_bonus, Local(dk, dv, dg, read)

    def states_backward(self, local: Local, dS_out: Tensor | None) -> Gradients:
        """Add to dk, dv and dg, in place, the part that flows through the states after the chunks.

        dS_out already includes every later span. The total decay of a span therefore needs no gradient of its own.
        """
        dk, dv, dg, (_, x, kept, dh) = local
        if dh is None:
            return Gradients(None, dk, dv, dg)
        for block in reversed(self.chunks.blocks):
            tokens = _Tokens(block, x)
            if block.ends_span:
                dS = empty_states(x) if dS_out is None else dS_out[block.span].flatten(0, 1)
            d_after, dS = tokens.chain_backward(dh[block.chunks], dS)
            dk_, dv_, dg_ = tokens.writes_backward(kept.states[block.chunks], d_after)
            block.add(dk, dk_)
            block.add(dv, dv_)
            if dg is not None and dg_ is not None:
                block.add(dg, dg_)
        return Gradients(None, dk, dv, dg)

    def _states(self, tokens: _Tokens, S: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the states that enter the chunks of a block that S enters, and the state after it. One chunk alone has
        none: no state enters it, and nobody reads the one after it."""
        if self.chunks.pieces.count == 1:
            return None, S
        H = S.new_empty(tokens.block.count, *S.shape)
        return H, tokens.chain(S, H)

    def _before_chunks(self, totals: Tensor | None, S_in: Tensor) -> Tensor | None:
        """Compute D [N,B,H(,K)], the log decay from a span's start to each chunk's start. D is -inf if a document has
        begun between. Return None if nothing decays."""
        pieces = self.chunks.pieces
        if totals is None and all(pieces.open):
            return None
        before = S_in.new_zeros(pieces.count, 1, 1) if totals is None else decays_before(totals, pieces)
        for span in range(pieces.spans):
            here = pieces.of_span(span)
            reached = sum(piece.reached for piece in pieces.all[here])
            before[here.start + reached : here.stop].fill_(float("-inf"))
        return before


class _Tokens(Tokens):
    """The arithmetic on the tokens of a block."""

    @cached_property
    def written(self) -> Tensor:
        """The keys exp(R_t) k_t."""
        return self.decays.until(self.k)

    @cached_property
    def bonus(self) -> Tensor | None:
        """The bonus of each row, [(N B H), 1, K]."""
        u = self.x.bonus
        return None if u is None else u.repeat(len(self.q) // len(u), 1).unsqueeze(1)

    @cached_property
    def scores(self) -> Tensor:
        """The scores of pairs in a chunk, with the bonus on the diagonal."""
        scores = self.decays.scores(self.q, self.k)
        if self.bonus is not None:
            scores.diagonal(dim1=1, dim2=2).add_((self.bonus * self.q * self.k).sum(-1))
        return scores

    def chain(self, S: Tensor, H: Tensor) -> Tensor:
        """Compute the states H [N,BH,K,V] that enter the chunks of a block that S enters. Returns the state after."""
        added = self.by_chunk(self.written.mT @ self.v)
        states = [*H.unbind(), torch.empty_like(S)]
        states[0].copy_(S)
        for n, piece in enumerate(self.block.pieces):
            if piece.begins_document:
                states[n].zero_()
            self.decayed(n, states[n], out=states[n + 1], added=added[n])
        return states[-1]

    def chain_backward(self, dh: Tensor, dS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the states after the chunks, and of the state that enters the block. dh are those of
        the states that enter the chunks, from the outputs; dS is that of the state after the block."""
        d_after = torch.empty_like(dh)
        states = [torch.empty_like(dS), *d_after.unbind()]
        states[-1].copy_(dS)
        for n in reversed(range(self.block.count)):
            self.decayed(n, states[n + 1], out=states[n], added=dh[n])
            if self.block.pieces[n].begins_document:
                states[n].zero_()
        return d_after, states[0]

    def read(self, o: Tensor, H: Tensor | None, scale: float) -> Tensor:
        """Return scale * (o + (exp(P) q) H)."""
        return o * scale if H is None else torch.baddbmm(o, self.reading, H.flatten(0, 1), beta=scale, alpha=scale)

    def read_backward(self, do: Tensor) -> Tensor:
        """Return the gradients of H from the outputs."""
        return self.by_chunk(self.reading.mT @ do)

    def outputs_backward(
        self, do: Tensor, H: Tensor | None, d_bonus: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return dq, and the parts of dk, dv and dg from the outputs of the same chunk. Adds to d_bonus."""
        d_scores = do @ self.v.mT
        d_self = None if self.bonus is None else d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
        dq_read = None if H is None else self.decays.since(do @ H.flatten(0, 1).mT)
        dq, dk, dg = self.decays.backward(d_scores, self.q, self.k, dq_read)
        if self.bonus is not None and d_self is not None and d_bonus is not None:
            dq.addcmul_(d_self, self.bonus * self.k)
            dk.addcmul_(d_self, self.bonus * self.q)
            d_bonus += (d_self * self.q * self.k).unflatten(0, (-1, self.heads)).sum((0, 2))
        return dq, dk, self.scores.mT @ do, dg

    def writes_backward(self, H: Tensor, d_after: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the parts of dk, dv and dg that flow through the states after the chunks."""
        H, d_after = H.flatten(0, 1), d_after.flatten(0, 1)
        dk = self.decays.until(self.v @ d_after.mT)
        return dk, self.written @ d_after, self.decays.writes_backward(self.k, dk, H, d_after)
