"""The log decays of N chunks of C tokens: the factors of single tokens, and the scores between pairs of tokens.

    since    exp(P_t) q_t, P_t = g_1 + ... + g_t            exclusive: P_t = g_1 + ... + g_(t-1)
    until    exp(R_t) k_t, R_t = g_(t+1) + ... + g_C
    scores   q_t . exp(g_(s+1) + ... + g_t) k_s, s <= t     exclusive: q_t . exp(g_(s+1) + ... + g_(t-1)) k_s, s < t

Exclusive sums are those of a token that reads the state before it. Scores are 0 elsewhere. Decays g are None, [N, C] or
[N, C, K], and at most 0. Factors are products of runs of decays, and no factor is ever over 1.

The form of the arithmetic depends on shapes alone. If values chose it, a token could change the last bits of results
before it, or in another document.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import running_sum


def chunk_decays(g: Tensor | None, exclusive: bool = False) -> Decays:
    """Choose the form of the decays of a block."""
    if g is None:
        return Decays(exclusive)
    return ScalarDecays(g.unsqueeze(-1), exclusive) if g.ndim == 2 else VectorDecays(g, exclusive)


class Decays:
    """The form without decays, and the base of the others."""

    def __init__(self, exclusive: bool) -> None:
        self.exclusive = exclusive
        self.total: Tensor | None = None  # the log decay of each whole chunk [N, K or 1]
        self.whole: Tensor | None = None  # its exponential, shaped to multiply a state [N, K, V]

    def since(self, x: Tensor) -> Tensor:
        """Return x [N, C, K] decayed from the chunk's start, or x itself."""
        return x

    def until(self, x: Tensor) -> Tensor:
        """Return x [N, C, K] decayed to the chunk's end, or x itself."""
        return x

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores [N, C, C] of q and k [N, C, K]."""
        return (q @ k.mT).tril_(-1 if self.exclusive else 0)

    def backward(
        self, d_scores: Tensor, q: Tensor, k: Tensor, dq_since: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return dq, dk and dg from the scores and, for dq and dg, from `since(q)`, given the gradient of q through
        that. Overwrites d_scores and dq_since."""
        d_scores.tril_(-1 if self.exclusive else 0)
        dq = d_scores @ k if dq_since is None else dq_since.baddbmm_(d_scores, k)
        return dq, d_scores.mT @ q, None

    def writes_backward(self, k: Tensor, dk_until: Tensor, H: Tensor, d_after: Tensor) -> Tensor | None:
        """Return the part of dg from `until(k)` and from the decay of whole chunks. Given are the gradient of k through
        `until`, the states H that enter the chunks, and the gradients of the states after them."""
        return None


class _Decaying(Decays):
    """The factors of single tokens exp(P) and exp(R) [N, C, K or 1], and the gradient of g."""

    def __init__(self, g_NCK: Tensor, exclusive: bool) -> None:
        super().__init__(exclusive)
        total = g_NCK.sum(1)
        self.total, self.whole, self._g = total, total.exp().unsqueeze(-1), g_NCK

    @cached_property
    def _since(self) -> Tensor:
        return running_sum(self._g, "before" if self.exclusive else "through").exp_()

    @cached_property
    def _until(self) -> Tensor:
        return running_sum(self._g, "after").exp_()

    def since(self, x: Tensor) -> Tensor:
        return self._since * x

    def until(self, x: Tensor) -> Tensor:
        return self._until * x

    def _per_decay(self, product: Tensor) -> Tensor:
        """Sum [N, ..., K] over the channels that share a decay: [N, ..., K or 1]."""
        return product if self._g.shape[2] > 1 else product.sum(-1, keepdim=True)

    def _backward_of_pairs(self, d_scores: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return dq and dk from the scores of pairs s < t."""
        raise NotImplementedError

    def backward(
        self, d_scores: Tensor, q: Tensor, k: Tensor, dq_since: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # 1. Take the gradients of the sums from products without the diagonal, which has no decay.
        dq, dk = self._backward_of_pairs(d_scores, q, k)
        if dq_since is not None:
            dq.add_(dq_since)
        read, written = self._per_decay(q * dq), self._per_decay(k * dk)
        if self.exclusive:
            return dq, dk, running_sum(read, "after") - running_sum(written, "from")
        # 2. Add the diagonal.
        diagonal = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        return dq.addcmul_(diagonal, k), dk.addcmul_(diagonal, q), running_sum(read - written, "from")

    def writes_backward(self, k: Tensor, dk_until: Tensor, H: Tensor, d_after: Tensor) -> Tensor:
        assert self.whole is not None
        d_whole = self._per_decay((H * d_after).sum(-1)).unsqueeze(1) * self.whole.mT
        return running_sum(self._per_decay(k * dk_until), "before") + d_whole


class ScalarDecays(_Decaying):
    """The scores as q_t . k_s times the decay of each pair, for one decay per head.

    Differences of running sums are taken in fp64. They are therefore exact in the dtype of g, even next to decays at
    their floor.
    """

    @cached_property
    def _between(self) -> Tensor:
        """The decay [N, C, C] of each pair, 0 where no score is."""
        through = self._g.squeeze(-1).double().cumsum(1)
        until = F.pad(through[:, :-1], (1, 0)) if self.exclusive else through
        sums = (until[:, :, None] - through[:, None, :]).to(self._g.dtype)
        return sums.exp_().tril_(-1 if self.exclusive else 0)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT).mul_(self._between)

    def _backward_of_pairs(self, d_scores: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        below = (d_scores * self._between).tril_(-1)
        return below @ k, below.mT @ q


class VectorDecays(_Decaying):
    """The scores by halving, for a decay per key channel: a chunk is two halves with a rectangle between them.

    Each half is two quarters with a rectangle between them, and so on. The middle m of a rectangle separates each of
    its pairs (s, t). The decay of a pair is exp(sum over (s, m]) * exp(sum over (m, t]). A rectangle is therefore one
    matrix product. The factors are multiplied upwards from single tokens. The diagonal has no decay.
    """

    @cached_property
    def _levels(self) -> list[tuple[int, Tensor, Tensor]]:
        """The levels: half length, factors of the right half's q, factors of the left half's k.

        The last products are those over whole chunks, `_since` and `_until`.
        """
        through, after, levels, half = self._g.exp(), torch.ones_like(self._g), [], 1
        while half < self._g.shape[1]:
            (total, right), (left, _) = _halves(through, half), _halves(after, half)
            levels.append((half, _shifted(right) if self.exclusive else right.clone(), left.clone()))
            left *= right[:, :, -1:]
            right *= total[:, :, -1:]
            half *= 2
        vars(self).update(_since=_shifted(through) if self.exclusive else through, _until=after)
        return levels

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q.new_zeros(*q.shape[:2], q.shape[1]) if self.exclusive else torch.diag_embed((q * k).sum(-1))
        for half, right, left in self._levels:
            q_right, k_left = _halves(q, half)[1] * right, _halves(k, half)[0] * left
            _rectangles(scores, half).copy_(q_right @ k_left.mT)
        return scores

    def _backward_of_pairs(self, d_scores: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for half, right, left in self._levels:
            d_rectangle = _rectangles(d_scores, half)
            q_right, k_left = _halves(q, half)[1] * right, _halves(k, half)[0] * left
            _halves(dq, half)[1].addcmul_(_product(d_rectangle, k_left), right)
            _halves(dk, half)[0].addcmul_(_product(d_rectangle.mT, q_right), left)
        return dq, dk


def _product(weights: Tensor, x: Tensor) -> Tensor:
    """Return weights [..., half, half] @ x [..., half, K]. torch has no fast product below 400 multiplications."""
    half = weights.shape[-1]
    if half * half * x.shape[-1] >= 400:
        return weights @ x
    total = weights[..., :1] * x[..., :1, :]
    for column in range(1, half):
        total.addcmul_(weights[..., column, None], x[..., column, None, :])
    return total


def _shifted(factors: Tensor) -> Tensor:
    """Return for each token the factor of the token before it, and 1 for the first."""
    return F.pad(factors[..., :-1, :], (0, 0, 1, 0), value=1.0)


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Split x into left and right halves, [N, pairs, half, K] each."""
    left, right = x.view(len(x), -1, 2, half, x.shape[2]).unbind(2)
    return left, right


def _rectangles(square: Tensor, half: int) -> Tensor:
    """View the rectangles (t in a right half, s in its left half) of [N, C, C] as [N, pairs, half, half]."""
    count = square.shape[1] // (2 * half)
    blocks = square.view(len(square), count, 2, half, count, 2, half)
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
