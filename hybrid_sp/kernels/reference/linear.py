"""Chunkwise linear attention on one device, in three phases that a sequence-parallel schedule can come between.

    S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T          o_t = scale * q_t S_t

With h_c the state that enters chunk c if its span began empty, P_t the sum of g from the chunk's start through t, R_t
the sum after t to the chunk's end, D_c the sum of g over the span's chunks before c (-inf once a document has begun),
and S_in the state that enters the span:

    states   h_(c+1) = exp(g summed over c) h_c + sum over t in c of (exp(R_t) k_t) v_t^T
    intra    o_t = sum over s <= t of (q_t . exp(g_(s+1) + ... + g_t) k_s) v_s                     (s, t in one chunk)
    inter    o_t = scale * (o_t + (exp(P_t) q_t) (h_c + exp(D_c) S_in))

With a bonus u a token reads the state before it: o_t = scale * q_t (S_(t-1) + diag(u) k_t v_t^T), RWKV-6's form. Then
the sums in intra and P_t exclude g_t, and the token itself counts (u q_t . k_t) v_t.

Each phase is a pair of plain functions, `x_forward` and `x_backward`, that work through blocks of chunks with bounded
temporaries. `kept` is what one hands to the next beside tensors with a gradient. Decays g are natural logs, None |
[B,T,H] | [B,T,H,K], at most 0 and at least `checks.FLOORS`. Only sums of g over runs of tokens are exponentiated, so no
exponent is ever positive. Everything is in one dtype, fp32 or fp64. This is the reference of `gpu/linear.py`, which has
the same functions.

Sources: chunkwise form, GLA (arXiv 2312.06635, section 4) and Mamba-2 (arXiv 2405.21060, section 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunks import Block, Chunks, cut, running_sum
from .scores import scores

PADDING = 1  # columns that v is widened by for a normaliser, of which one is used


class Plan(NamedTuple):
    """What the phases of one call share."""

    chunks: Any  # of this backend's `partition`
    scale: float
    entered: bool  # whether states enter the spans: the third phase is given S_in
    gated: bool  # whether g needs a gradient
    dtype: torch.dtype  # of o


def partition(lengths: Sequence[int], boundaries: Sequence[int], v: Tensor) -> Chunks:
    """How these phases cut spans of these lengths (tokens), and at `boundaries`, the tokens of the rank at which
    documents begin."""
    return cut(lengths, v.shape[0] * v.shape[2], boundaries)


def _over_state(decay: Tensor, ndim: int) -> Tensor:
    """exp of a log decay [..., H] or [..., H, K], ready to multiply a state [..., H, K, V] of `ndim` dims."""
    factor = decay.exp().unsqueeze(-1)
    return factor if factor.ndim == ndim else factor.unsqueeze(-1)


def _over_tokens(decay: Tensor) -> Tensor:
    """exp of a log decay [N, C] or [N, C, K], ready to multiply [N, C, K]."""
    factor = decay.exp()
    return factor if factor.ndim == 3 else factor.unsqueeze(-1)


def _decay_gradient(product: Tensor, g: Tensor) -> Tensor:
    """Gradient of a log decay from (factor * its gradient) [..., K]: summed over K where the decay is one number."""
    return product if product.ndim == g.ndim else product.sum(-1)


def states_forward(k: Tensor, v: Tensor, g: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """States that enter each chunk (and leave each span), every span beginning empty.

    k [B,T,G,K], v [B,T,H,V], g None | [B,T,H] | [B,T,H,K]. Returns h [N,B,H,K,V], the states that leave the spans
    [s,B,H,K,V], the log decay of each chunk, None | [N,B,H] | [N,B,H,K], and nothing kept.
    """
    chunks: Chunks = plan.chunks
    batch, _, heads, width = v.shape
    h = k.new_empty(chunks.count, batch, heads, k.shape[-1], width)
    leaving = torch.empty_like(h[: chunks.spans])
    totals = None if g is None else g.new_empty(chunks.count, batch, heads, *g.shape[3:])
    for block in chunks:
        k_NCK = block.load(k, heads)
        decays = None
        if g is not None and totals is not None:
            g_NC = block.load(g, heads)
            k_NCK = k_NCK * _over_tokens(running_sum(g_NC, "after"))
            totals[block.chunks] = g_NC.sum(1).view_as(totals[block.chunks])
            decays = _over_state(totals[block.chunks], 5)
        added = (k_NCK.mT @ block.load(v, heads)).unflatten(0, (block.count, batch, heads))
        for n in range(block.count):
            here = h[block.first + n]
            if chunks.fresh[block.first + n]:
                here.zero_()
            after = chunks.after(block.first + n, block.span, h, leaving)
            if after is None:
                continue
            if decays is None:
                torch.add(added[n], here, out=after)
            else:
                torch.addcmul(added[n], decays[n], here, out=after)
    return h, leaving, totals, None


class Kept(NamedTuple):
    """What `intra_backward` hands to `states_backward`: gradients that do not come through the states, and S_in."""

    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    S_in: Tensor | None


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
    """Gradients dk, dv, dg: adds to those of `intra_backward` (in place) what comes through the states, from the
    gradients of the entering states dh [N,B,H,K,V] and of the states that leave the spans d_leaving [s,B,H,K,V], in
    the whole sequence; with them a span's own chain of chunks gives all, and its decay needs no gradient."""
    chunks: Chunks = plan.chunks
    heads = v.shape[2]
    dk, dv, dg, S_in = kept
    carried = None if S_in is None else _before_chunks(totals, chunks, S_in)
    d_before = torch.zeros_like(h[0])  # gradient of the state before the block that comes next
    for block in reversed(chunks):
        if block.first + block.count == chunks.bounds[block.span + 1]:
            d_before = torch.zeros_like(d_before) if d_leaving is None else d_leaving[block.span]
        decays = None if totals is None else _over_state(totals[block.chunks], 5)
        d_added = h.new_empty(block.count, *h.shape[1:])
        d_added[-1] = d_before
        d_before = torch.empty_like(d_before)
        for n in reversed(range(block.count)):
            before = d_added[n - 1] if n else d_before
            if chunks.fresh[block.first + n]:
                before.zero_()
            elif decays is None:
                torch.add(dh[block.first + n], d_added[n], out=before)
            else:
                torch.addcmul(dh[block.first + n], decays[n], d_added[n], out=before)
        flat = d_added.flatten(0, 2)
        k_NCK, v_NCV = block.load(k, heads), block.load(v, heads)
        dk_NCK = v_NCV @ flat.mT
        if g is not None and dg is not None and totals is not None and decays is not None:
            after = running_sum(block.load(g, heads), "after")
            factor = _over_tokens(after)
            dk_NCK.mul_(factor)
            d_after_sum = _decay_gradient(dk_NCK * k_NCK, after)
            d_total = (flat * _entering(block, h, carried, S_in)).view_as(d_added).sum(-1)
            d_total = _decay_gradient(d_total * decays.squeeze(-1), totals)
            block.add(dg, running_sum(d_after_sum, "before") + d_total.flatten(0, 2).unsqueeze(1))
            k_NCK = k_NCK * factor
        block.add(dk, dk_NCK)
        block.add(dv, k_NCK @ flat)
    return dk, dv, dg


def intra_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, bonus: Tensor | None, h: Tensor, kept: None, plan: Plan
) -> tuple[Tensor, None]:
    """The part of o [B,T,H,V] that comes from tokens of the same chunk, not yet scaled; nothing kept."""
    heads = v.shape[2]
    o = torch.empty_like(v)
    for block in plan.chunks:
        q_NCK, k_NCK = block.load(q, heads), block.load(k, heads)
        weights = scores(_load(block, g, heads), bonus is not None).weights(q_NCK, k_NCK)
        if bonus is not None:
            weights.diagonal(dim1=1, dim2=2).add_((_over_rows(bonus, q_NCK) * q_NCK * k_NCK).sum(-1))
        block.store(o, weights @ block.load(v, heads))
    return o, None


def intra_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    h: Tensor,
    totals: Tensor | None,
    S_in: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor | None, Kept]:
    """All gradients that need no other rank's: dq and that of the bonus whole, and of dk, dv, dg what does not come
    through the states."""
    chunks: Chunks = plan.chunks
    heads, exclusive = v.shape[2], bonus is not None
    before = None if S_in is None else _before_chunks(totals, chunks, S_in)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dg = None if g is None else torch.empty_like(g)
    d_bonus = None if bonus is None else torch.zeros_like(bonus)
    for block in chunks:
        do_NCV = block.load(do, heads) * plan.scale
        q_NCK, k_NCK, g_NC = block.load(q, heads), block.load(k, heads), _load(block, g, heads)
        block_scores = scores(g_NC, exclusive)
        weights = block_scores.weights(q_NCK, k_NCK)
        d_weights = do_NCV @ block.load(v, heads).mT
        d_self = d_weights.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone() if exclusive else None
        dq_NCK, dk_NCK, dg_NC = block_scores.backward(d_weights, q_NCK, k_NCK, weights)
        if bonus is not None and d_bonus is not None and d_self is not None:
            u = _over_rows(bonus, q_NCK)
            weights.diagonal(dim1=1, dim2=2).add_((u * q_NCK * k_NCK).sum(-1))
            dq_NCK.addcmul_(d_self, u * k_NCK)
            dk_NCK.addcmul_(d_self, u * q_NCK)
            d_bonus += (d_self * q_NCK * k_NCK).unflatten(0, (-1, heads)).sum((0, 2))
        block.store(dv, weights.mT @ do_NCV)
        dq_read = do_NCV @ _entering(block, h, before, S_in).mT
        if g_NC is not None and dg is not None and dg_NC is not None:
            read = running_sum(g_NC, "before" if exclusive else "through")
            dq_read.mul_(_over_tokens(read))
            d_read = _decay_gradient(dq_read * q_NCK, read)
            block.store(dg, dg_NC.add_(running_sum(d_read, "after" if exclusive else "from")))
        block.store(dq, dq_NCK.add_(dq_read))
        block.store(dk, dk_NCK)
    return dq, d_bonus, Kept(dk, dv, dg, S_in)


def _load(block: Block, g: Tensor | None, heads: int) -> Tensor | None:
    return None if g is None else block.load(g, heads)


def _over_rows(bonus_HK: Tensor, rows: Tensor) -> Tensor:
    """The bonus of each row [(N B H), 1, K] of a block."""
    return bonus_HK.repeat(len(rows) // len(bonus_HK), 1).unsqueeze(1)


def _before_chunks(totals: Tensor | None, chunks: Chunks, S_in: Tensor) -> Tensor | None:
    """D: log decay from the start of its span to the start of each chunk, [N,B,H(,K)], -inf where a document has begun
    between; None where nothing decays."""
    if totals is None:
        if all(chunks.reached):
            return None
        before = S_in.new_zeros(chunks.count, 1, 1)
    else:
        before = torch.zeros_like(totals)
        for span in range(chunks.spans):
            here = chunks.of_span(span)
            before[here.start + 1 : here.stop] = totals[here.start : here.stop - 1].cumsum(0)
    before[[n for n, reached in enumerate(chunks.reached) if not reached]] = float("-inf")
    return before


def _entering(block: Block, h: Tensor, before: Tensor | None, S_in: Tensor | None) -> Tensor:
    """h_c + exp(D_c) S_in for the chunks of a block, [(N B H), K, V]."""
    states = h[block.chunks]
    if S_in is not None and before is not None:
        states = torch.addcmul(states, _over_state(before[block.chunks], 5), S_in[block.span])
    elif S_in is not None:
        states = states + S_in[block.span]
    return states.flatten(0, 2)


def _reading(block: Block, q: Tensor, g: Tensor | None, exclusive: bool, heads: int) -> Tensor:
    """exp(P_t) q_t of a block."""
    q_NCK = block.load(q, heads)
    if g is None:
        return q_NCK
    return q_NCK * _over_tokens(running_sum(block.load(g, heads), "before" if exclusive else "through"))


def inter_forward(
    o_intra: Tensor,
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    h: Tensor,
    totals: Tensor | None,
    S_in: Tensor | None,
    kept: None,
    plan: Plan,
) -> Tensor:
    """o from o_intra, in its place: adds what the entering states contribute, and scales. S_in [s,B,H,K,V], or None
    where no state enters."""
    chunks: Chunks = plan.chunks
    heads, scale = o_intra.shape[2], plan.scale
    before = None if S_in is None else _before_chunks(totals, chunks, S_in)
    for block in chunks:
        q_NCK, entering = _reading(block, q, g, bonus is not None, heads), _entering(block, h, before, S_in)
        o_NCV = torch.baddbmm(block.load(o_intra, heads), q_NCK, entering, beta=scale, alpha=scale)
        block.store(o_intra, o_NCV)
    return o_intra


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What other ranks wait for: dh and dS_in; S_in is kept. Gradients of q and g are `intra_backward`'s."""
    chunks: Chunks = plan.chunks
    heads = do.shape[2]
    before = None if S_in is None else _before_chunks(totals, chunks, S_in)
    dh = torch.empty_like(h)
    dS_in = None if S_in is None else torch.zeros_like(S_in)
    for block in chunks:
        d_states = dh[block.chunks]
        flat, q_NCK = d_states.flatten(0, 2), _reading(block, q, g, bonus is not None, heads)
        torch.baddbmm(flat, q_NCK.mT, block.load(do, heads), beta=0, alpha=plan.scale, out=flat)
        if dS_in is not None:
            d_carried = d_states if before is None else d_states * _over_state(before[block.chunks], 5)
            dS_in[block.span] += d_carried.sum(0)
    return dh, dS_in, S_in
