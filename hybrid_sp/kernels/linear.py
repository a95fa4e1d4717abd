"""Chunkwise linear attention on one device, in three phases that a sequence-parallel schedule can come between.

    S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T          o_t = scale * q_t S_t

With h_c the state that enters chunk c if its span began empty, P_t the sum of g from the chunk's start through t, R_t
the sum after t to the chunk's end, D_c the sum of g over the span's chunks before c, and S_in the state that enters the
span:

    states   h_(c+1) = exp(g summed over c) h_c + sum over t in c of (exp(R_t) k_t) v_t^T
    intra    o_t = sum over s <= t of (q_t . exp(g_(s+1) + ... + g_t) k_s) v_s                     (s, t in one chunk)
    inter    o_t = scale * (o_t + (exp(P_t) q_t) (h_c + exp(D_c) S_in))

Each phase is a pair of plain functions, `x_forward` and `x_backward`, that work through blocks of chunks with bounded
temporaries. Decays g are natural logs, None | [B,T,H] | [B,T,H,K], finite and at most 0. Only sums of g over runs of
tokens are exponentiated, so no exponent is ever positive. Everything is in one dtype, fp32 or fp64.

Sources: chunkwise form, GLA (arXiv 2312.06635, section 4) and Mamba-2 (arXiv 2405.21060, section 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import Block, Chunks, between, running_sum


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


def states_forward(k: Tensor, v: Tensor, g: Tensor | None, chunks: Chunks) -> tuple[Tensor, Tensor | None]:
    """States that enter each chunk (and leave each span), every span beginning empty.

    k [B,T,G,K], v [B,T,H,V], g None | [B,T,H] | [B,T,H,K]. Returns h [slots,B,H,K,V] (see `Chunks.slots`) and the log
    decay of each chunk, None | [N,B,H] | [N,B,H,K].
    """
    batch, _, heads, width = v.shape
    h = k.new_empty(chunks.slots, batch, heads, k.shape[-1], width)
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
        if block.slot == 0 or block.slot - 1 in chunks.leaving:
            h[block.slot] = 0
        for n in range(block.count):
            here, after = h[block.slot + n], h[block.slot + n + 1]
            if decays is None:
                torch.add(added[n], here, out=after)
            else:
                torch.addcmul(added[n], decays[n], here, out=after)
    return h, totals


def states_backward(
    dh: Tensor | None,
    d_leaving: Tensor | None,
    d_totals: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    h: Tensor,
    totals: Tensor | None,
    chunks: Chunks,
    grads: tuple[Tensor, Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients dk, dv, dg: adds to those of `intra_backward` (in place) what comes through the states, from the
    gradients of the entering states dh [slots,B,H,K,V], of the states that leave the spans d_leaving [s,B,H,K,V] and
    of the chunks' log decays."""
    heads = v.shape[2]
    dk, dv, dg = grads
    d_before = torch.zeros_like(h[0])  # gradient of the state before the block that comes next
    for block in reversed(chunks):
        if block.slot + block.count in chunks.leaving:
            d_before = torch.zeros_like(d_before) if d_leaving is None else d_leaving[block.span]
        decays = None if totals is None else _over_state(totals[block.chunks], 5)
        d_added = h.new_empty(block.count, *h.shape[1:])
        d_added[-1] = d_before
        d_before = torch.empty_like(d_before)
        for n in reversed(range(block.count)):
            before = d_added[n - 1] if n else d_before
            d_enter = torch.zeros_like(before) if dh is None else dh[block.slot + n]
            if decays is None:
                torch.add(d_enter, d_added[n], out=before)
            else:
                torch.addcmul(d_enter, decays[n], d_added[n], out=before)
        flat = d_added.flatten(0, 2)
        k_NCK, v_NCV = block.load(k, heads), block.load(v, heads)
        dk_NCK = v_NCV @ flat.mT
        if g is not None and dg is not None and totals is not None and decays is not None:
            after = running_sum(block.load(g, heads), "after")
            factor = _over_tokens(after)
            dk_NCK.mul_(factor)
            d_after_sum = _decay_gradient(dk_NCK * k_NCK, after)
            d_total = (d_added * h[block.states]).sum(-1)
            d_total = _decay_gradient(d_total * decays.squeeze(-1), totals)
            if d_totals is not None:
                d_total = d_total + d_totals[block.chunks]
            block.add(dg, running_sum(d_after_sum, "before") + d_total.flatten(0, 2).unsqueeze(1))
            k_NCK = k_NCK * factor
        block.add(dk, dk_NCK)
        block.add(dv, k_NCK @ flat)
    return dk, dv, dg


def intra_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, chunks: Chunks) -> Tensor:
    """The part of o [B,T,H,V] that comes from tokens of the same chunk, not yet scaled."""
    heads = v.shape[2]
    o = torch.empty_like(v)
    for block in chunks:
        block.store(o, _scores(block, q, k, g, heads).weights() @ block.load(v, heads))
    return o


def intra_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    h: Tensor,
    totals: Tensor | None,
    S_in: Tensor | None,
    scale: float,
    chunks: Chunks,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All gradients that need no other rank's: dq whole, and of dk, dv, dg what does not come through the states."""
    heads = v.shape[2]
    before = None if totals is None or S_in is None else _before_chunks(totals, chunks)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dg = None if g is None else torch.empty_like(g)
    for block in chunks:
        do_NCV = block.load(do, heads) * scale
        scores = _scores(block, q, k, g, heads)
        weights = scores.weights()
        block.store(dv, weights.mT @ do_NCV)
        dq_NCK, dk_NCK, dg_NC = scores.backward(do_NCV @ block.load(v, heads).mT, weights)
        dq_read = do_NCV @ _entering(block, h, before, S_in).mT
        if scores.g is not None and dg is not None and dg_NC is not None:
            through = running_sum(scores.g, "through")
            dq_read.mul_(_over_tokens(through))
            dg_NC += running_sum(_decay_gradient(dq_read * scores.q, through), "from")
            block.store(dg, dg_NC)
        block.store(dq, dq_NCK.add_(dq_read))
        block.store(dk, dk_NCK)
    return dq, dk, dv, dg


def _scores(block: Block, q: Tensor, k: Tensor, g: Tensor | None, heads: int) -> _ScalarScores | _VectorScores:
    """How much token t reads of token s of the same chunk, for a block."""
    kind = _VectorScores if g is not None and g.ndim == 4 else _ScalarScores
    return kind(block.load(q, heads), block.load(k, heads), None if g is None else block.load(g, heads))


class _ScalarScores:
    """Weights under no decay or one decay per head: (q k^T) * exp(sums of g between s and t), 0 for s > t."""

    def __init__(self, q: Tensor, k: Tensor, g: Tensor | None) -> None:
        self.q, self.k, self.g = q, k, g
        self.decay = None if g is None else between(g).exp_()

    def weights(self) -> Tensor:
        """[N, C, C] of N chunks."""
        weights = self.q @ self.k.mT
        return weights.tril_() if self.decay is None else weights.mul_(self.decay)

    def backward(self, d_weights: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """dq, dk, dg; writes over d_weights."""
        dg = None
        if self.decay is None:
            d_weights.tril_()
        else:
            moved = (d_weights * weights).tril_(-1)
            dg = running_sum(moved.sum(2) - moved.sum(1), "from")
            d_weights.mul_(self.decay)
        return d_weights @ self.k, d_weights.mT @ self.q, dg


class _VectorScores:
    """Weights under a decay per key channel, by halving: a chunk is two halves with a rectangle between them, and each
    half is two quarters, and so on. In a rectangle every pair (s, t) is parted by the middle m, so its decay is
    exp(sum over (s, m]) * exp(sum over (m, t]) with both exponents at most 0, and the rectangle is one matrix product.
    Sums are built upwards from single tokens. The diagonal has no decay."""

    def __init__(self, q: Tensor, k: Tensor, g: Tensor | None) -> None:
        assert g is not None
        self.q, self.k, self.g = q, k, g
        self.levels: list[tuple[int, Tensor, Tensor]] = []  # half length, decay of the right half's q, of the left's k
        through, after = g.clone(), torch.zeros_like(g)
        half = 1
        while half < g.shape[1]:
            (total, right), (left, _) = self._halves(through, half), self._halves(after, half)
            self.levels.append((half, right.exp(), left.exp()))
            left += right[:, :, -1:]
            right += total[:, :, -1:]
            half *= 2

    @staticmethod
    def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """Left and right halves, [N, pairs, half, K] each."""
        pairs = x.unflatten(1, (x.shape[1] // (2 * half), 2, half))
        return pairs[:, :, 0], pairs[:, :, 1]

    @staticmethod
    def _rectangles(square: Tensor, half: int) -> Tensor:
        """The rectangles (t in a right half, s in its left half) of [N, C, C], as a view [N, pairs, half, half]."""
        count = square.shape[1] // (2 * half)
        blocks = square.unflatten(2, (count, 2, half)).unflatten(1, (count, 2, half))
        return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def weights(self) -> Tensor:
        weights = torch.diag_embed((self.q * self.k).sum(-1))
        for half, right, left in self.levels:
            q_right, k_left = self._halves(self.q, half)[1] * right, self._halves(self.k, half)[0] * left
            self._rectangles(weights, half).copy_(q_right @ k_left.mT)
        return weights

    def backward(self, d_weights: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dq, dk = torch.zeros_like(self.q), torch.zeros_like(self.k)
        for half, right, left in self.levels:
            d_rectangle = self._rectangles(d_weights, half)
            q_right, k_left = self._halves(self.q, half)[1] * right, self._halves(self.k, half)[0] * left
            self._halves(dq, half)[1].addcmul_(d_rectangle @ k_left, right)
            self._halves(dk, half)[0].addcmul_(d_rectangle.mT @ q_right, left)
        dg = running_sum(self.q * dq - self.k * dk, "from")
        diagonal = d_weights.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        return dq.addcmul_(diagonal, self.k), dk.addcmul_(diagonal, self.q), dg


def _before_chunks(totals: Tensor, chunks: Chunks) -> Tensor:
    """D: log decay from the start of its span to the start of each chunk, shaped like `totals`."""
    before = torch.zeros_like(totals)
    for span in range(len(chunks.leaving)):
        here = chunks.of_span(span)
        before[here.start + 1 : here.stop] = totals[here.start : here.stop - 1].cumsum(0)
    return before


def _entering(block: Block, h: Tensor, before: Tensor | None, S_in: Tensor | None) -> Tensor:
    """h_c + exp(D_c) S_in for the chunks of a block, [(N B H), K, V]."""
    states = h[block.states]
    if S_in is not None and before is not None:
        states = torch.addcmul(states, _over_state(before[block.chunks], 5), S_in[block.span])
    elif S_in is not None:
        states = states + S_in[block.span]
    return states.flatten(0, 2)


def _reading(block: Block, q: Tensor, g: Tensor | None, heads: int) -> Tensor:
    """exp(P_t) q_t of a block."""
    q_NCK = block.load(q, heads)
    return q_NCK if g is None else q_NCK * _over_tokens(running_sum(block.load(g, heads), "through"))


def inter_forward(
    o_intra: Tensor,
    q: Tensor,
    g: Tensor | None,
    h: Tensor,
    totals: Tensor | None,
    S_in: Tensor | None,
    scale: float,
    chunks: Chunks,
) -> Tensor:
    """o from o_intra, in its place: adds what the entering states contribute, and scales. S_in [s,B,H,K,V], or None
    where no state enters."""
    heads = o_intra.shape[2]
    before = None if totals is None or S_in is None else _before_chunks(totals, chunks)
    for block in chunks:
        q_NCK, entering = _reading(block, q, g, heads), _entering(block, h, before, S_in)
        o_NCV = torch.baddbmm(block.load(o_intra, heads), q_NCK, entering, beta=scale, alpha=scale)
        block.store(o_intra, o_NCV)
    return o_intra


def inter_backward(
    do: Tensor,
    q: Tensor,
    g: Tensor | None,
    h: Tensor,
    totals: Tensor | None,
    S_in: Tensor | None,
    scale: float,
    chunks: Chunks,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What other ranks wait for: dh, d_totals and dS_in of `inter_forward`. Those of q and g are `intra_backward`'s."""
    heads = do.shape[2]
    before = None if totals is None or S_in is None else _before_chunks(totals, chunks)
    dh = torch.empty_like(h)
    dS_in = None if S_in is None else torch.zeros_like(S_in)
    d_before = None if before is None else torch.empty_like(before)
    dh[list(chunks.leaving)] = 0
    for block in chunks:
        d_states = dh[block.states]
        flat, q_NCK = d_states.flatten(0, 2), _reading(block, q, g, heads)
        torch.baddbmm(flat, q_NCK.mT, block.load(do, heads), beta=0, alpha=scale, out=flat)
        if S_in is not None and dS_in is not None:
            if before is None or d_before is None:
                dS_in[block.span] += d_states.sum(0)
            else:
                d_carried = d_states * _over_state(before[block.chunks], 5)
                dS_in[block.span] += d_carried.sum(0)
                d_before[block.chunks] = _decay_gradient((d_carried * S_in[block.span]).sum(-1), before)
    d_totals = None if d_before is None else torch.zeros_like(d_before)
    if d_before is not None and d_totals is not None:
        for span in range(len(chunks.leaving)):
            here = chunks.of_span(span)
            later = d_before[here.start + 1 : here.stop].flip(0).cumsum(0).flip(0)
            d_totals[here.start : here.stop - 1] = later
    return dh, d_totals, dS_in
