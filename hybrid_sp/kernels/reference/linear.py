"""The chunkwise form of linear attention on one device, in three phases between which ranks can communicate.

    S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T          o_t = scale * q_t S_t

h_c is the state that enters chunk c if its span began empty, and S_in the state that enters the span. P_t is the sum of
g from the chunk's start through t, and R_t the sum after t to the chunk's end. D_c is the sum of g over the span's
chunks before c, or -inf once a document has begun.

    states   h_(c+1) = exp(g summed over c) h_c + sum over t in c of (exp(R_t) k_t) v_t^T
    intra    o_t = sum over s <= t of (q_t . exp(g_(s+1) + ... + g_t) k_s) v_s                     (s, t in one chunk)
    inter    o_t = scale * (o_t + (exp(P_t) q_t) (h_c + exp(D_c) S_in))

With a bonus u, a token reads the state before it: o_t = scale * q_t (S_(t-1) + diag(u) k_t v_t^T), RWKV-6's form. Then
the sums in intra and P_t exclude g_t, and the token itself adds (u q_t . k_t) v_t.

Each phase works through blocks of chunks with bounded temporaries. Decays g are natural logs, None | [B,T,H] |
[B,T,H,K], at most 0 and at least `checks.FLOORS`. Only sums of g over runs of tokens are exponentiated, so no exponent
is ever positive. Everything is in one dtype, fp32 or fp64. This is the reference of `gpu/linear.py`.

Sources: chunkwise form, GLA (arXiv 2312.06635, section 4) and Mamba-2 (arXiv 2405.21060, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..phases import AffineState, Gradients, Inputs, Options
from ..pieces import Spans, decays_before, over_state, span_decays
from .chunks import Block, Chunks, chunks_of, running_sum
from .decay_mask import decay_mask


class States(NamedTuple):
    """The results of phase 1 per chunk: the states h [N,B,H,K,V] that enter the chunks if every span begins empty, and
    the log decays of the chunks, None | [N,B,H] | [N,B,H,K]."""

    h: Tensor
    totals: Tensor | None


class Reading(NamedTuple):
    """The results of `inter_backward`: the gradients of o and of h, and the tensors that `intra_backward` needs."""

    do: Tensor
    dh: Tensor
    x: Inputs
    states: States
    S_in: Tensor | None


class Local(NamedTuple):
    """The results of `intra_backward`: the gradient of h, the gradients of k, v and g without the part that flows
    through the states, and the tensors that `states_backward` needs."""

    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    dh: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    states: States
    S_in: Tensor | None


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

    def states_forward(self, x: Inputs) -> tuple[AffineState | None, States]:
        """Compute h, the states that enter the chunks, and the states that leave the spans, as if every span began
        empty."""
        chunks, pieces, k, v, g = self.chunks, self.chunks.pieces, x.k, x.v, x.g
        batch, _, heads, width = v.shape
        h = k.new_empty(pieces.count, batch, heads, k.shape[-1], width)
        leaving = torch.empty_like(h[: pieces.spans])
        totals = None if g is None else g.new_empty(pieces.count, batch, heads, *g.shape[3:])
        for block in chunks.blocks:
            k_NCK = block.load(k, heads)
            decays = None
            if g is not None and totals is not None:
                g_NC = block.load(g, heads)
                k_NCK = k_NCK * _over_tokens(running_sum(g_NC, "after"))
                totals[block.chunks] = g_NC.sum(1).view_as(totals[block.chunks])
                decays = over_state(totals[block.chunks])
            added = (k_NCK.mT @ block.load(v, heads)).unflatten(0, (block.count, batch, heads))
            for n in range(block.count):
                here = h[block.first + n]
                if pieces.all[block.first + n].fresh:
                    here.zero_()
                if (after := chunks.after(block.first + n, block.span, h, leaving)) is not None:
                    if decays is None:
                        torch.add(added[n], here, out=after)
                    else:
                        torch.addcmul(added[n], decays[n], here, out=after)
        summary = AffineState(span_decays(totals, pieces), leaving) if self.options.entered else None
        return summary, States(h, totals)

    def intra_forward(self, x: Inputs, work: States) -> tuple[Tensor, States]:
        """Compute the part of o [B,T,H,V] that comes from tokens of the same chunk, before scaling."""
        heads = x.v.shape[2]
        o = torch.empty_like(x.v)
        for block in self.chunks.blocks:
            q_NCK, k_NCK = block.load(x.q, heads), block.load(x.k, heads)
            g_NC = None if x.g is None else block.load(x.g, heads)
            scores = decay_mask(g_NC, x.bonus is not None).scores(q_NCK, k_NCK)
            if x.bonus is not None:
                scores.diagonal(dim1=1, dim2=2).add_((_over_rows(x.bonus, q_NCK) * q_NCK * k_NCK).sum(-1))
            block.store(o, scores @ block.load(x.v, heads))
        return o, work

    def inter_forward(self, x: Inputs, work: States, o_intra: Tensor, S_in: Tensor | None) -> tuple[Tensor, States]:
        """Add the contribution of the entering states to o_intra, in place, and scale the sum to o."""
        heads, scale = o_intra.shape[2], self.options.scale
        before = self._before_chunks(work.totals, S_in)
        for block in self.chunks.blocks:
            q_NCK, entering = _reading(block, x, heads), _entering(block, work.h, before, S_in)
            o_NCV = torch.baddbmm(block.load(o_intra, heads), q_NCK, entering, beta=scale, alpha=scale)
            block.store(o_intra, o_NCV)
        return o_intra, work

    def inter_backward(
        self, do: Tensor, x: Inputs, saved: States, S_in: Tensor | None
    ) -> tuple[Tensor | None, Reading]:
        """Compute dS_in, and the gradients dh of the states that enter the chunks."""
        heads = do.shape[2]
        before = self._before_chunks(saved.totals, S_in)
        dh = torch.empty_like(saved.h)
        dS_in = None if S_in is None else torch.zeros_like(S_in)
        for block in self.chunks.blocks:
            # 1. Compute the gradient of the state that each chunk reads: dh = scale * (exp(P) q)^T do.
            d_states = dh[block.chunks]
            flat, q_NCK = d_states.flatten(0, 2), _reading(block, x, heads)
            torch.baddbmm(flat, q_NCK.mT, block.load(do, heads), beta=0, alpha=self.options.scale, out=flat)
            # 2. Carry it back to the start of the span: dS_in = sum over c of exp(D_c) dh_c.
            if dS_in is not None:
                d_carried = d_states if before is None else d_states * over_state(before[block.chunks])
                dS_in[block.span] += d_carried.sum(0)
        return dS_in, Reading(do, dh, x, saved, S_in)

    def intra_backward(self, read: Reading) -> tuple[Tensor, Tensor | None, Local]:
        """Compute dq and the gradient of the bonus completely, and dk, dv and dg without the part that flows through
        the states."""
        do, dh, (q, k, v, g, _, bonus), states, S_in = read
        heads, exclusive = v.shape[2], bonus is not None
        before = self._before_chunks(states.totals, S_in)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dg = None if g is None else torch.empty_like(g)
        d_bonus = None if bonus is None else torch.zeros_like(bonus)
        for block in self.chunks.blocks:
            # 1. Pairs of tokens within a chunk give dv, and parts of dq, dk, dg and the bonus.
            do_NCV = block.load(do, heads) * self.options.scale
            q_NCK, k_NCK = block.load(q, heads), block.load(k, heads)
            g_NC = None if g is None else block.load(g, heads)
            mask = decay_mask(g_NC, exclusive)
            scores = mask.scores(q_NCK, k_NCK)
            d_scores = do_NCV @ block.load(v, heads).mT
            d_self = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone() if exclusive else None
            dq_NCK, dk_NCK, dg_NC = mask.backward(d_scores, q_NCK, k_NCK, scores)
            if bonus is not None and d_bonus is not None and d_self is not None:
                u = _over_rows(bonus, q_NCK)
                scores.diagonal(dim1=1, dim2=2).add_((u * q_NCK * k_NCK).sum(-1))
                dq_NCK.addcmul_(d_self, u * k_NCK)
                dk_NCK.addcmul_(d_self, u * q_NCK)
                d_bonus += (d_self * q_NCK * k_NCK).unflatten(0, (-1, heads)).sum((0, 2))
            block.store(dv, scores.mT @ do_NCV)
            # 2. The states that queries read give the rest of dq, and their part of dg through P.
            dq_read = do_NCV @ _entering(block, states.h, before, S_in).mT
            if g_NC is not None and dg is not None and dg_NC is not None:
                through = running_sum(g_NC, "before" if exclusive else "through")
                dq_read.mul_(_over_tokens(through))
                d_through = _decay_gradient(dq_read * q_NCK, through)
                block.store(dg, dg_NC.add_(running_sum(d_through, "after" if exclusive else "from")))
            block.store(dq, dq_NCK.add_(dq_read))
            block.store(dk, dk_NCK)
        return dq, d_bonus, Local(dk, dv, dg, dh, k, v, g, states, S_in)

    def states_backward(self, local: Local, dS_out: Tensor | None) -> Gradients:
        """Add to dk, dv and dg, in place, the part that flows through the states.

        dS_out already includes every later span. The total decay of a span therefore needs no gradient of its own.
        """
        dk, dv, dg, dh, k, v, g, (h, totals), S_in = local
        chunks, pieces = self.chunks, self.chunks.pieces
        heads = v.shape[2]
        carried = self._before_chunks(totals, S_in)
        d_before = torch.zeros_like(h[0])  # gradient of the state before the block done last
        for block in reversed(chunks.blocks):
            # 1. Compute the gradient of the state after each chunk, from the last chunk of a span to its first.
            d_added = torch.empty_like(dh[block.chunks])
            if not chunks.ends_span(block):
                d_added[-1] = d_before
            else:
                d_added[-1] = 0 if dS_out is None else dS_out[block.span]
            decays = None if totals is None else over_state(totals[block.chunks])
            for n in reversed(range(block.count)):
                before = d_added[n - 1] if n else d_before
                if pieces.all[block.first + n].fresh:
                    before.zero_()
                elif decays is None:
                    torch.add(dh[block.first + n], d_added[n], out=before)
                else:
                    torch.addcmul(dh[block.first + n], decays[n], d_added[n], out=before)
            # 2. Compute the part of dk that flows through these states.
            flat = d_added.flatten(0, 2)
            k_NCK, v_NCV = block.load(k, heads), block.load(v, heads)
            dk_NCK = v_NCV @ flat.mT
            # 3. Add the parts of dg through R and through the chunk's total decay.
            if g is not None and dg is not None and totals is not None and decays is not None:
                after = running_sum(block.load(g, heads), "after")
                factor = _over_tokens(after)
                dk_NCK.mul_(factor)
                d_after_sum = _decay_gradient(dk_NCK * k_NCK, after)
                d_total = (flat * _entering(block, h, carried, S_in)).view_as(d_added).sum(-1)
                d_total = _decay_gradient(d_total * decays.squeeze(-1), totals)
                block.add(dg, running_sum(d_after_sum, "before") + d_total.flatten(0, 2).unsqueeze(1))
                k_NCK = k_NCK * factor
            # 4. Add to dk, and to dv with keys decayed to the end of the chunk.
            block.add(dk, dk_NCK)
            block.add(dv, k_NCK @ flat)
        return Gradients(None, dk, dv, dg)

    def _before_chunks(self, totals: Tensor | None, S_in: Tensor | None) -> Tensor | None:
        """Compute D [N,B,H(,K)], the log decay from a span's start to each chunk's start. D is -inf if a document has
        begun between. Return None if nothing decays."""
        pieces = self.chunks.pieces
        if S_in is None or (totals is None and all(pieces.open)):
            return None
        before = S_in.new_zeros(pieces.count, 1, 1) if totals is None else decays_before(totals, pieces)
        before[[n for n, piece in enumerate(pieces.all) if not piece.reached]] = float("-inf")
        return before


def _over_tokens(decay: Tensor) -> Tensor:
    """Return exp of a log decay [N, C] or [N, C, K], shaped to multiply [N, C, K]."""
    factor = decay.exp()
    return factor if factor.ndim == 3 else factor.unsqueeze(-1)


def _decay_gradient(product: Tensor, g: Tensor) -> Tensor:
    """Reduce (factor * its gradient) [..., K] to the gradient of the log decay g. The product is summed over K if g has
    one number per head."""
    return product if product.ndim == g.ndim else product.sum(-1)


def _over_rows(bonus_HK: Tensor, rows: Tensor) -> Tensor:
    """Repeat the bonus for each row [(N B H), 1, K] of a block."""
    return bonus_HK.repeat(len(rows) // len(bonus_HK), 1).unsqueeze(1)


def _entering(block: Block, h: Tensor, before: Tensor | None, S_in: Tensor | None) -> Tensor:
    """Return h_c + exp(D_c) S_in for the chunks of a block, [(N B H), K, V]."""
    states = h[block.chunks]
    if S_in is not None and before is not None:
        states = torch.addcmul(states, over_state(before[block.chunks]), S_in[block.span])
    elif S_in is not None:
        states = states + S_in[block.span]
    return states.flatten(0, 2)


def _reading(block: Block, x: Inputs, heads: int) -> Tensor:
    """Return exp(P_t) q_t of a block."""
    q_NCK = block.load(x.q, heads)
    if x.g is None:
        return q_NCK
    before = "before" if x.bonus is not None else "through"
    return q_NCK * _over_tokens(running_sum(block.load(x.g, heads), before))
