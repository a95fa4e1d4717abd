"""The chunkwise form of linear attention on one device, in three phases between which ranks can communicate.

    S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T          o_t = scale * q_t S_t

H_c is the state that enters chunk c. P_t is the sum of g from the chunk's start through t, and R_t the sum after t to
the chunk's end.

    chain    H_(c+1) = exp(g summed over c) H_c + sum over t in c of (exp(R_t) k_t) v_t^T
    within   o_t = sum over s <= t of (q_t . exp(g_(s+1) + ... + g_t) k_s) v_s                     (s, t in one chunk)
    read     o_t = scale * (o_t + (exp(P_t) q_t) H_c)

With a bonus u, a token reads the state before it: o_t = scale * q_t (S_(t-1) + diag(u) k_t v_t^T), RWKV-6's form. Then
the sums in `within` and P_t exclude g_t, and the token itself adds (u q_t . k_t) v_t.

Phase `states` is the chain from empty states, `intra` is `within`, and `inter` is the chain again, from the states that
enter the spans, and `read`. If nothing is exchanged, phase `intra` is all of these in one walk.

A walk goes from block to block of chunks, with bounded temporaries. Of the states H only those that enter blocks are
kept for backward, which makes the others again. Decays g are natural logs, None | [B,T,H] | [B,T,H,K], at most 0 and at
least `checks.FLOORS`. Everything is in one dtype, fp32 or fp64. This is the reference of `gpu/linear.py`.

Sources: chunkwise form, GLA (arXiv 2312.06635, section 4) and Mamba-2 (arXiv 2405.21060, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..phases import AffineState, Gradients, Inputs, Options
from ..pieces import Spans, span_decays
from .chunks import Block, Chunks, chunks_of
from .decays import chunk_decays


class Kept(NamedTuple):
    """The states [blocks,BH,K,V] that enter the blocks."""

    entering: Tensor


class Reading(NamedTuple):
    """The tensors that backward needs after `inter_backward`."""

    do: Tensor
    x: Inputs
    kept: Kept


class Local(NamedTuple):
    """The gradients of k, v and g, perhaps without the part that flows through the states after chunks; `read` is None
    if they are complete."""

    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    read: Reading | None


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
        return cls(chunks_of(spans, x.v), options), x.to(torch.promote_types(x.v.dtype, torch.float32))

    def states_forward(self, x: Inputs) -> tuple[AffineState | None, None]:
        """Compute the states that leave the spans, as if every span began empty."""
        if not self.options.entered:
            return None, None
        leaving, totals = [], []
        S = _empty(x)
        for block in self.chunks.blocks:
            tokens = _Tokens(block, x)
            _, S = tokens.states(_empty(x) if block.begins_span else S)
            totals.append(tokens.decays.total)
            if block.ends_span:
                leaving.append(S)
        return AffineState(self._span_decays(x, totals), torch.stack(leaving).unflatten(1, x.v.shape[::2])), None

    def intra_forward(self, x: Inputs, work: None) -> tuple[Tensor, Kept | None]:
        """Compute the part of o [B,T,H,V] from tokens of the same chunk, before scaling; all of o if nothing is
        exchanged."""
        if not self.options.entered:
            return self._forward(x, None, None)
        o = torch.empty_like(x.v)
        for block in self.chunks.blocks:
            tokens = _Tokens(block, x)
            block.store(o, tokens.scores @ tokens.v)
        return o, None

    def inter_forward(self, x: Inputs, work: Kept | None, o_intra: Tensor, S_in: Tensor | None) -> tuple[Tensor, Kept]:
        """Add to o_intra, in place, what tokens read of the states before their chunks, and scale the sum to o."""
        return self._forward(x, o_intra, S_in) if work is None else (o_intra, work)

    def _forward(self, x: Inputs, o_intra: Tensor | None, S_in: Tensor | None) -> tuple[Tensor, Kept]:
        """Walk through the chain of states and read it. Without o_intra, also compute that."""
        o, scale, entering = torch.empty_like(x.v) if o_intra is None else o_intra, self.options.scale, []
        for block in self.chunks.blocks:
            tokens = _Tokens(block, x)
            if block.begins_span:
                S = _empty(x) if S_in is None else S_in[block.span].flatten(0, 1)
            entering.append(S)
            o_ = tokens.scores @ tokens.v if o_intra is None else block.load(o_intra, tokens.heads)
            if self._alone:
                block.store(o, o_ * scale)
            else:
                H, S = tokens.states(S)
                block.store(o, torch.baddbmm(o_, tokens.reading, H, beta=scale, alpha=scale))
        return o, Kept(torch.stack(entering))

    @property
    def _alone(self) -> bool:
        """Tell whether there is one chunk, which no state enters and whose state nobody reads."""
        return self.chunks.pieces.count == 1 and not self.options.entered

    def inter_backward(self, do: Tensor, x: Inputs, saved: Kept, S_in: Tensor | None) -> tuple[Tensor | None, Reading]:
        """Compute dS_in, the chain of gradients from empty ones back to the start of each span."""
        read = Reading(do, x, saved)
        if S_in is None:
            return None, read
        dS_in, dS = torch.empty_like(S_in), _empty(x)
        for block in reversed(self.chunks.blocks):
            tokens = _Tokens(block, x)
            dS = _empty(x) if block.ends_span else dS
            _, dS = tokens.states_backward(block.load(do, tokens.heads) * self.options.scale, dS)
            if block.begins_span:
                dS_in[block.span] = dS.view_as(dS_in[block.span])
        return dS_in, read

    def intra_backward(self, read: Reading) -> tuple[Tensor, Tensor | None, Local]:
        """Compute dq and the gradient of the bonus completely, and dk, dv and dg without the part that flows through
        the states after chunks. If nothing is exchanged, compute all gradients."""
        (do, x, (entering,)), exchanged = read, self.options.entered
        dq, dk, dv = torch.empty_like(x.q), torch.empty_like(x.k), torch.empty_like(x.v)
        dg = None if x.g is None else torch.empty_like(x.g)
        d_bonus = None if x.bonus is None else torch.zeros_like(x.bonus)
        dS = _empty(x)
        for n, block in reversed(list(enumerate(self.chunks.blocks))):
            tokens = _Tokens(block, x)
            do_NCV, H = block.load(do, tokens.heads) * self.options.scale, None
            if not self._alone:
                H, _ = tokens.states(entering[n])
            dq_NCK, dk_NCK, dv_NCV, dg_NC = tokens.outputs_backward(do_NCV, H, d_bonus)
            if not exchanged and H is not None:
                dS = _empty(x) if block.ends_span else dS
                dH, dS = tokens.states_backward(do_NCV, dS)
                dk_through, dv_through, dg_through = tokens.writes_backward(H, dH)
                dk_NCK, dv_NCV = dk_NCK.add_(dk_through), dv_NCV.add_(dv_through)
                dg_NC = None if dg_NC is None or dg_through is None else dg_NC.add_(dg_through)
            block.store(dq, dq_NCK)
            block.store(dk, dk_NCK)
            block.store(dv, dv_NCV)
            if dg is not None and dg_NC is not None:
                block.store(dg, dg_NC)
        return dq, d_bonus, Local(dk, dv, dg, read if exchanged else None)

    def states_backward(self, local: Local, dS_out: Tensor | None) -> Gradients:
        """Add to dk, dv and dg, in place, the part that flows through the states after chunks.

        dS_out already includes every later span. The total decay of a span therefore needs no gradient of its own.
        """
        dk, dv, dg, read = local
        if read is None:
            return Gradients(None, dk, dv, dg)
        do, x, (entering,) = read
        for n, block in reversed(list(enumerate(self.chunks.blocks))):
            tokens = _Tokens(block, x)
            if block.ends_span:
                dS = _empty(x) if dS_out is None else dS_out[block.span].flatten(0, 1)
            dH, dS = tokens.states_backward(block.load(do, tokens.heads) * self.options.scale, dS)
            H, _ = (None, None) if dg is None else tokens.states(entering[n])
            dk_NCK, dv_NCV, dg_NC = tokens.writes_backward(H, dH)
            block.add(dk, dk_NCK)
            block.add(dv, dv_NCV)
            if dg is not None and dg_NC is not None:
                block.add(dg, dg_NC)
        return Gradients(None, dk, dv, dg)

    def _span_decays(self, x: Inputs, totals: list[Tensor | None]) -> Tensor | None:
        """Sum the log decays of chunks [(N B H), K or 1] to those of spans, [s,B,H] or [s,B,H,K]."""
        if x.g is None:
            return None
        per_chunk = torch.cat([total for total in totals if total is not None])
        return span_decays(per_chunk.view(-1, x.v.shape[0], x.v.shape[2], *x.g.shape[3:]), self.chunks.pieces)


class _Tokens:
    """The tokens of a block, loaded when they are needed, and the arithmetic on them."""

    def __init__(self, block: Block, x: Inputs) -> None:
        self.block, self.x, self.heads = block, x, x.v.shape[2]
        self.decays = chunk_decays(None if x.g is None else block.load(x.g, self.heads), x.bonus is not None)

    @cached_property
    def q(self) -> Tensor:
        return self.block.load(self.x.q, self.heads)

    @cached_property
    def k(self) -> Tensor:
        return self.block.load(self.x.k, self.heads)

    @cached_property
    def v(self) -> Tensor:
        return self.block.load(self.x.v, self.heads)

    @cached_property
    def reading(self) -> Tensor:
        """The queries exp(P_t) q_t."""
        return self.decays.since(self.q)

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

    @cached_property
    def _decay(self) -> Tensor | None:
        """The decay of a state over each whole chunk, [N,BH,K or 1,1]."""
        return None if self.decays.whole is None else self.decays.whole.unflatten(0, (self.block.count, -1))

    def states(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states [(N B H),K,V] that enter the chunks and the state after the last, for S that enters the
        block."""
        added = (self.written.mT @ self.v).unflatten(0, (self.block.count, -1))
        H = torch.empty_like(added)
        states = [*H.unbind(), torch.empty_like(S)]
        states[0].copy_(S)
        for n, piece in enumerate(self.block.pieces):
            if piece.begins_document:
                states[n].zero_()
            self._step(added, n, states[n], out=states[n + 1])
        return H.flatten(0, 1), states[-1]

    def states_backward(self, do: Tensor, dS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients [(N B H),K,V] of the states after the chunks, and of the state that enters the block,
        for dS of the state that leaves it."""
        read = (self.reading.mT @ do).unflatten(0, (self.block.count, -1))
        d_after = torch.empty_like(read)
        d_after[-1] = dS
        states = [torch.empty_like(dS), *d_after.unbind()]
        for n in reversed(range(self.block.count)):
            self._step(read, n, states[n + 1], out=states[n])
            if self.block.pieces[n].begins_document:
                states[n].zero_()
        return d_after.flatten(0, 1), states[0]

    def _step(self, added: Tensor, n: int, S: Tensor, out: Tensor) -> None:
        """Compute the n-th of `added` plus S, decayed over chunk n."""
        if self._decay is None:
            torch.add(added[n], S, out=out)
        else:
            torch.addcmul(added[n], self._decay[n], S, out=out)

    def outputs_backward(
        self, do: Tensor, H: Tensor | None, d_bonus: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return dq, and the parts of dk, dv and dg from the outputs of the same chunk. Adds to d_bonus."""
        d_scores = do @ self.v.mT
        d_self = None if self.bonus is None else d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
        dq_read = None if H is None else self.decays.since(do @ H.mT)
        dq, dk, dg = self.decays.backward(d_scores, self.q, self.k, dq_read)
        if self.bonus is not None and d_self is not None and d_bonus is not None:
            dq.addcmul_(d_self, self.bonus * self.k)
            dk.addcmul_(d_self, self.bonus * self.q)
            d_bonus += (d_self * self.q * self.k).unflatten(0, (-1, self.heads)).sum((0, 2))
        return dq, dk, self.scores.mT @ do, dg

    def writes_backward(self, H: Tensor | None, d_after: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the parts of dk, dv and dg that flow through the states after the chunks. dg needs H."""
        dk = self.decays.until(self.v @ d_after.mT)
        dg = None if H is None else self.decays.writes_backward(self.k, dk, H, d_after)
        return dk, self.written @ d_after, dg


def _empty(x: Inputs) -> Tensor:
    """Return empty states [BH,K,V]."""
    batch, _, heads, width = x.v.shape
    return x.v.new_zeros(batch * heads, x.k.shape[-1], width)
