"""The one cutter of a rank's spans at documents. A piece lies in one document and one span.

The torch reference cuts spans into chunks, our Triton kernels into segments of many chunks, and fla's passes into whole
runs of a document. Each is a view of these pieces, which have at most `size` tokens.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """The tokens that a rank holds: the lengths of its spans, and the local indices of tokens at which documents
    begin."""

    lengths: tuple[int, ...]
    boundaries: tuple[int, ...] = ()


class Piece(NamedTuple):
    """The tokens [start, stop) of the rank, from one span and one document. If `reached`, no document has begun in the
    span before or at this piece. The state that enters the span then reaches the piece."""

    start: int
    stop: int
    span: int
    begins_span: bool
    ends_span: bool
    begins_document: bool
    reached: bool

    @property
    def fresh(self) -> bool:
        """Tell whether no state of the same span enters the piece."""
        return self.begins_span or self.begins_document


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of a rank, in order.

    bounds  the first piece of each span, and the number of pieces
    open    per span: no document begins in it, so the state that enters it reaches its end
    """

    all: tuple[Piece, ...]
    bounds: tuple[int, ...]
    open: tuple[bool, ...]

    @property
    def count(self) -> int:
        return len(self.all)

    @property
    def spans(self) -> int:
        return len(self.open)

    def of_span(self, span: int) -> slice:
        """Return the indices of the pieces of one span."""
        return slice(self.bounds[span], self.bounds[span + 1])


@functools.lru_cache(maxsize=64)
def cut(spans: Spans, size: int | None = None) -> Pieces:
    """Cut spans where documents begin, and then into pieces of at most `size` tokens."""
    pieces: list[Piece] = []
    bounds, open_spans = [0], []
    for span, (a, b) in enumerate(itertools.pairwise(itertools.accumulate(spans.lengths, initial=0))):
        documents = {t for t in spans.boundaries if a <= t < b}
        first = min(documents, default=b)
        for start, stop in itertools.pairwise(sorted({a, *documents, b})):
            for t in range(start, stop, size or stop - start):
                end = min(t + size, stop) if size else stop
                pieces.append(Piece(t, end, span, t == a, end == b, t in documents, t < first))
        bounds.append(len(pieces))
        open_spans.append(not documents)
    return Pieces(tuple(pieces), tuple(bounds), tuple(open_spans))


def decays_before(totals: Tensor, pieces: Pieces) -> Tensor:
    """Sum the log decays of the pieces of a span to those from the span's start to each piece's start. `totals` and
    the result are [pieces,B,H] or [pieces,B,H,K]."""
    before = torch.zeros_like(totals)
    for span in range(pieces.spans):
        here = pieces.of_span(span)
        before[here.start + 1 : here.stop] = totals[here.start : here.stop - 1].cumsum(0)
    return before


def span_decays(totals: Tensor | None, pieces: Pieces) -> Tensor | None:
    """Sum the log decays of pieces to those of each span, [s,B,H] or [s,B,H,K]. The result is -inf if a document begins
    in the span."""
    if totals is None:
        return None
    spans = [totals[pieces.of_span(i)].sum(0) for i in range(pieces.spans)]
    return torch.stack(
        [x if whole else torch.full_like(x, float("-inf")) for x, whole in zip(spans, pieces.open, strict=True)]
    )


def over_state(decay: Tensor) -> Tensor:
    """Return exp of log decays [n,B,H] or [n,B,H,K], shaped to multiply states [n,B,H,K,V]."""
    factor = decay.exp().unsqueeze(-1)
    return factor if factor.ndim == 5 else factor.unsqueeze(-1)
