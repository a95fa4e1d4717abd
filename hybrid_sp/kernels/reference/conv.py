"""The short causal depthwise convolution on one rank, and the part from the tokens before it, without communication.

    y_t = bias + sum over j < W of weight[:, W-1-j] x_(t-j)

A tap stops at a start: the first token of a span or of a document. Tokens before a span arrive later, as its halo.
Without a weight this is the token shift y_t = x_(t-1). Sums are in the dtype of the weight; x may be narrower. The work
is multiply-adds of shifted tokens, block by block, so a block stays in the cache.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...transfer import to_device

BLOCK = 1 << 18  # numbers in a block of x, on the CPU


class Taps:
    """The taps of one call: weight [D,W], or None for the shift. `starts` are local tokens in ascending order, without
    0."""

    def __init__(self, weight: Tensor | None, starts: Sequence[int], x: Tensor) -> None:
        self.width = 2 if weight is None else weight.shape[1]
        self.weights = [None, None] if weight is None else list(weight.t().flip(0).contiguous())
        self._crossing = _crossing(tuple(starts), self.width, x.shape[1], x.device)

    def crossing(self, j: int, begin: int, end: int) -> Tensor | None:
        """Return the tokens of [begin, end) whose tap j would cross a start, counted from begin; None if no tap
        does."""
        tokens, index = self._crossing[j]
        first, last = bisect.bisect_left(tokens, begin), bisect.bisect_left(tokens, end)
        return index[first:last] - begin if first < last else None


@functools.lru_cache(maxsize=64)
def _crossing(starts: tuple[int, ...], width: int, tokens: int, device: torch.device) -> list[tuple[list[int], Tensor]]:
    """Return for each tap the tokens whose tap would cross a start, here and on the device."""
    found = [sorted({t for start in starts for t in range(start, min(start + j, tokens))}) for j in range(width)]
    return [(here, to_device(torch.tensor(here), device)) for here in found]


def blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges of tokens."""
    tokens = x.shape[1]
    step = max(1, BLOCK // max(1, x.shape[0] * x.shape[2])) if x.device.type == "cpu" else tokens
    for begin in range(0, tokens, step):
        yield begin, min(begin + step, tokens)


def local_forward(x: Tensor, taps: Taps, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute y [B,T,D] from x [B,T,D] as if every start had zeros before it."""
    y = x.new_empty(x.shape, dtype=dtype)
    for begin, end in blocks(x):
        past = max(0, begin - taps.width + 1)
        x_block = x[:, past:end].to(dtype)
        _own_tap(y[:, begin:end], x_block[:, begin - past :], taps.weights[0], bias)
        for j in range(1, taps.width):
            t = max(begin, j)
            if t < end:
                tap = x_block[:, t - j - past : end - j - past]
                _add(y[:, t:end], _cleared(tap, taps.crossing(j, t, end)), taps.weights[j])
    return y


def local_backward(
    dy: Tensor, x: Tensor, taps: Taps, want_x: bool, want_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute dx [B,T,D] and dweight [D,W] in the dtype of dy."""
    dx = torch.empty_like(dy) if want_x else None
    dw = [dy.new_zeros(dy.shape[2]) for _ in range(taps.width)]
    for begin, end in blocks(dy):
        past = max(0, begin - taps.width + 1)
        x_block = x[:, past:end].to(dy.dtype)
        if dx is not None:
            _own_tap(dx[:, begin:end], dy[:, begin:end], taps.weights[0], None)
        for j in range(taps.width):
            t = max(begin, j)
            if t < end:
                given = _cleared(dy[:, t:end], taps.crossing(j, t, end))
                if dx is not None and j:
                    _add(dx[:, t - j : end - j], given, taps.weights[j])
                if want_weight:
                    dw[j] += (given * x_block[:, t - j - past : end - j - past]).sum((0, 1))
    return dx, torch.stack(dw[::-1], 1) if want_weight else None


def halo_forward(y: Tensor, halo: Tensor, taps: Taps, reaches: Sequence[tuple[int, int]]) -> Tensor:
    """Add to y, in place, the contribution of the W-1 tokens before each span, halo [s,B,W-1,D]. It changes the tokens
    of span i from local token reaches[i][0] up to reaches[i][1], the end of the span's first document."""
    for (first, end), tokens in zip(reaches, halo, strict=True):
        for j in range(1, taps.width):
            n = min(j, end - first)
            _add(y[:, first : first + n], tokens[:, taps.width - 1 - j :][:, :n], taps.weights[j])
    return y


def halo_backward(dy: Tensor, halo: Tensor, taps: Taps, reaches: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Compute d_halo [s,B,W-1,D], and the halo's part of dweight [D,W]."""
    d_halo = torch.zeros_like(halo)
    dw = dy.new_zeros(taps.width, dy.shape[2])
    for i, (first, end) in enumerate(reaches):
        for j in range(1, taps.width):
            n = min(j, end - first)
            rows = slice(taps.width - 1 - j, taps.width - 1 - j + n)
            _add(d_halo[i, :, rows], dy[:, first : first + n], taps.weights[j])
            dw[j] += (dy[:, first : first + n] * halo[i, :, rows]).sum((0, 1))
    return d_halo, dw.flip(0).t()


def _own_tap(out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Write the tap j = 0, which the shift does not have."""
    if weight is None:
        out.zero_()
    elif bias is None:
        torch.mul(x, weight, out=out)
    else:
        torch.addcmul(bias, x, weight, out=out)


def _add(out: Tensor, x: Tensor, weight: Tensor | None) -> None:
    out.add_(x) if weight is None else out.addcmul_(x, weight)


def _cleared(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Return x with these tokens set to zero, or x itself if there are none."""
    return x if tokens is None else x.index_fill(1, tokens, 0)
