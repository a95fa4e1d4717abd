"""The left product of linear attention, (q k^T * D) v: quadratic in the tokens, with no state.

    o_t = sum over s of exp(decay between s and t) (q_t . k_s) v_s          q is scaled by the caller

Ring Attention uses this form for linear layers; it is a baseline. Tensors have heads first, [B,H,T,K], in the dtype of
sums, with as many key heads as value heads. Products are made tile by tile, so no T x T matrix exists. Decays are log
sums over runs of tokens [B,H,T]. None is positive, and none is the difference of two others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.reference.decays import chunk_decays

QUERIES, KEYS = 256, 2048  # tokens in a tile


def through(g: Tensor) -> Tensor:
    """Return the log decay from before the first token to each token, that token's own included."""
    return g.cumsum(-1)


def through_backward(d: Tensor) -> Tensor:
    return d.flip(-1).cumsum(-1).flip(-1)


def after(g: Tensor) -> Tensor:
    """Return the log decay from each token to the last, the token's own not included."""
    return F.pad(g[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


def after_backward(d: Tensor) -> Tensor:
    return F.pad(d[..., :-1], (1, 0)).cumsum(-1)


def full_forward(o: Tensor, q: Tensor, k: Tensor, v: Tensor, read: Tensor, written: Tensor) -> None:
    """Add to o, in place, the product of all queries with all keys, D_ts = exp(read_t + written_s)."""
    for t in _tiles(q.shape[2], QUERIES):
        q_ = _weighed(q[:, :, t], read[:, :, t])
        for s in _tiles(k.shape[2], KEYS):
            o[:, :, t] += (q_ @ _weighed(k[:, :, s], written[:, :, s]).mT) @ v[:, :, s]


def full_backward(
    grads: tuple[Tensor, Tensor, Tensor], do: Tensor, q: Tensor, k: Tensor, v: Tensor, read: Tensor, written: Tensor
) -> tuple[Tensor, Tensor]:
    """Add to dq, dk and dv, in place; returns the gradients of read and of written, [B,H,T]."""
    dq, dk, dv = grads
    d_read, d_written = q.new_zeros(q.shape[:3]), k.new_zeros(k.shape[:3])
    for t in _tiles(q.shape[2], QUERIES):
        q_, dq_ = _weighed(q[:, :, t], read[:, :, t]), torch.zeros_like(q[:, :, t])
        for s in _tiles(k.shape[2], KEYS):
            k_ = _weighed(k[:, :, s], written[:, :, s])
            d_weights = do[:, :, t] @ v[:, :, s].mT
            dq_ += d_weights @ k_
            dk_ = d_weights.mT @ q_
            d_written[:, :, s] += (dk_ * k_).sum(-1)
            dk[:, :, s] += _weighed(dk_, written[:, :, s])
            dv[:, :, s] += (k_ @ q_.mT) @ do[:, :, t]
        d_read[:, :, t] = (dq_ * q_).sum(-1)
        dq[:, :, t] += _weighed(dq_, read[:, :, t])
    return d_read, d_written


def causal_forward(o: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> None:
    """Add to o, in place, the causal product of a run with itself, under the log decays g [B,H,T]."""
    for t in _tiles(q.shape[2], QUERIES):
        # 1. A tile reads all tiles before it.
        past, (q_, k_, v_, g_) = slice(0, t.start), _rows(t, q, k, v, g)
        full_forward(o[:, :, t], q[:, :, t], k[:, :, past], v[:, :, past], through(g[:, :, t]), after(g[:, :, past]))
        # 2. It reads itself under the causal mask.
        o[:, :, t] += (chunk_decays(g_).scores(q_, k_) @ v_).view_as(o[:, :, t])


def causal_backward(
    grads: tuple[Tensor, Tensor, Tensor], do: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor
) -> Tensor:
    """Add to dq, dk and dv, in place; returns dg."""
    (dq, dk, dv), dg = grads, q.new_zeros(q.shape[:3])
    for t in _tiles(q.shape[2], QUERIES):
        past, (q_, k_, v_, g_, do_) = slice(0, t.start), _rows(t, q, k, v, g, do)
        # 1. Gradients of the tile's reads from all tiles before it.
        part = dq[:, :, t], dk[:, :, past], dv[:, :, past]
        sides = through(g[:, :, t]), after(g[:, :, past])
        d_read, d_written = full_backward(part, do[:, :, t], q[:, :, t], k[:, :, past], v[:, :, past], *sides)
        # 2. Gradients of the tile's reads from itself, under the causal mask.
        decays = chunk_decays(g_)
        scores = decays.scores(q_, k_)
        dq_, dk_, dg_ = decays.backward(do_ @ v_.mT, q_, k_, None)
        assert dg_ is not None
        for x, grad in ((dq, dq_), (dk, dk_), (dv, scores.mT @ do_), (dg, dg_)):
            x[:, :, t] += grad.view_as(x[:, :, t])
        # 3. Gradients of the decays on both sides of the tile's begin.
        dg[:, :, t] += through_backward(d_read)
        dg[:, :, past] += after_backward(d_written)
    return dg


def _weighed(x: Tensor, log_weights: Tensor) -> Tensor:
    return x * log_weights.exp().unsqueeze(-1)


def _rows(t: slice, *xs: Tensor) -> list[Tensor]:
    """Return a tile of each tensor, with batch and heads as one dim."""
    return [x[:, :, t].flatten(0, 1) for x in xs]


def _tiles(tokens: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, tokens)) for first in range(0, tokens, size))
