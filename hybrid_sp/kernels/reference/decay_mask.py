"""The scores between tokens of one chunk, q_t . exp(sums of log decays between s and t) k_s, and their adjoint.

    scores[t, s] = q_t . exp(g_(s+1) + ... + g_t) k_s          s <= t
    scores[t, s] = q_t . exp(g_(s+1) + ... + g_(t-1)) k_s      s < t, exclusive: token t reads the state before it

Scores are 0 elsewhere. Only sums of g over runs of tokens are exponentiated, so no exponent is ever positive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import running_sum, triangle


def decay_mask(g: Tensor | None, exclusive: bool = False) -> DecayMask:
    """Make the mask of N chunks for log decays None, [N, C] or [N, C, K]. One object serves several pairs q, k."""
    return VectorDecayMask(g, exclusive) if g is not None and g.ndim == 3 else ScalarDecayMask(g, exclusive)


class ScalarDecayMask:
    """The mask for no decay or one decay per head: (q k^T) * exp(sums of g between s and t)."""

    def __init__(self, g: Tensor | None, exclusive: bool) -> None:
        self.exclusive = exclusive
        self.decay = None if g is None else between(g, exclusive).exp_()

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores [N, C, C] of q and k [N, C, K]."""
        scores = q @ k.mT
        return scores.tril_(-1 if self.exclusive else 0) if self.decay is None else scores.mul_(self.decay)

    def backward(self, d_scores: Tensor, q: Tensor, k: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return dq, dk and dg. This overwrites d_scores."""
        dg = None
        if self.decay is None:
            d_scores.tril_(-1 if self.exclusive else 0)
        else:
            moved = (d_scores * scores).tril_(-1)
            dg = _between_backward(moved.sum(2), moved.sum(1), self.exclusive)
            d_scores.mul_(self.decay)
        return d_scores @ k, d_scores.mT @ q, dg


class VectorDecayMask:
    """The mask for a decay per key channel, by halving: a chunk is two halves with a rectangle between them.

    Each half is two quarters with a rectangle between them, and so on. The middle m of a rectangle separates each of
    its pairs (s, t). The decay of a pair is exp(sum over (s, m]) * exp(sum over (m, t]), with both exponents at most 0.
    A rectangle is therefore one matrix product. Sums are built upwards from single tokens. The diagonal has no decay.
    """

    def __init__(self, g: Tensor, exclusive: bool) -> None:
        self.exclusive = exclusive
        self.levels: list[tuple[int, Tensor, Tensor]] = []  # half length, decay of the right half's q, of the left's k
        through, after = g.clone(), torch.zeros_like(g)
        half = 1
        while half < g.shape[1]:
            (total, right), (left, _) = _halves(through, half), _halves(after, half)
            read = F.pad(right[:, :, :-1], (0, 0, 1, 0)) if exclusive else right
            self.levels.append((half, read.exp(), left.exp()))
            left += right[:, :, -1:]
            right += total[:, :, -1:]
            half *= 2

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores [N, C, C] of q and k [N, C, K]."""
        scores = q.new_zeros(*q.shape[:2], q.shape[1]) if self.exclusive else torch.diag_embed((q * k).sum(-1))
        for half, right, left in self.levels:
            q_right, k_left = _halves(q, half)[1] * right, _halves(k, half)[0] * left
            _rectangles(scores, half).copy_(q_right @ k_left.mT)
        return scores

    def backward(self, d_scores: Tensor, q: Tensor, k: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dg."""
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for half, right, left in self.levels:
            d_rectangle = _rectangles(d_scores, half)
            q_right, k_left = _halves(q, half)[1] * right, _halves(k, half)[0] * left
            _halves(dq, half)[1].addcmul_(d_rectangle @ k_left, right)
            _halves(dk, half)[0].addcmul_(d_rectangle.mT @ q_right, left)
        dg = _between_backward(q * dq, k * dk, self.exclusive)
        if not self.exclusive:
            diagonal = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            dq.addcmul_(diagonal, k)
            dk.addcmul_(diagonal, q)
        return dq, dk, dg


DecayMask = ScalarDecayMask | VectorDecayMask


def between(g_NC: Tensor, exclusive: bool = False) -> Tensor:
    """Compute sums[n, t, s] = g[n, s+1] + ... + g[n, t] for s <= t (exclusive: through t-1, for s < t), and -inf
    elsewhere.

    Running sums are kept in two parts, which together are as exact as fp64. Their differences are therefore exact in
    the dtype of g, even next to decays at their floor.
    """
    through = g_NC.double().cumsum(1)
    until = F.pad(through[:, :-1], (1, 0)) if exclusive else through
    (high_t, low_t), (high_s, low_s) = (_two_parts(x, g_NC.dtype) for x in (until, through))
    sums = (high_t[:, :, None] - high_s[:, None, :]).add_(low_t[:, :, None]).sub_(low_s[:, None, :])
    mask = triangle(g_NC.shape[1], "strict mask" if exclusive else "mask", g_NC.dtype, g_NC.device)
    return sums.add_(mask)


def _two_parts(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = exact.to(dtype)
    return high, (exact - high).to(dtype)


def _between_backward(read: Tensor, written: Tensor, exclusive: bool) -> Tensor:
    """Return dg_j, the gradient of all pairs s < j <= t (exclusive: s < j < t). `read` sums the pairs at their t,
    `written` at their s. The result is the pairs with t past j, minus the pairs with s not before j."""
    if exclusive:
        return running_sum(read, "after") - running_sum(written, "from")
    return running_sum(read - written, "from")


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Split x into left and right halves, [N, pairs, half, K] each."""
    pairs = x.unflatten(1, (x.shape[1] // (2 * half), 2, half))
    return pairs[:, :, 0], pairs[:, :, 1]


def _rectangles(square: Tensor, half: int) -> Tensor:
    """View the rectangles (t in a right half, s in its left half) of [N, C, C] as [N, pairs, half, half]."""
    count = square.shape[1] // (2 * half)
    blocks = square.unflatten(2, (count, 2, half)).unflatten(1, (count, 2, half))
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
