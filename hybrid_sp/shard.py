"""The cut of a sequence over ranks: which tokens a rank holds, and how tensors are cut and joined.

A sequence of L tokens is cut into n spans, span i = [i*L//n, (i+1)*L//n), so lengths differ by at most one token. A
rank holds its spans one after the other, in sequence order.
"""

from __future__ import annotations

import itertools
import operator
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .comm import collectives, groups
from .comm.agreement import Agreement
from .comm.groups import Group
from .comm.link import Link
from .comm.pending import Header
from .eager import eager
from .transfer import to_device

P = ParamSpec("P")
R = TypeVar("R")

KINDS = ("linear", "softmax", "conv")  # kinds of layer that communicate
LAYOUTS = ("contiguous", "zigzag")
CHECKS = ("sequence", "calls", False)

# The names of strategies. Exchanges of states are in exchange/; baselines, other forms of the operator, in baselines/.
STATE_EXCHANGES = ("all_gather", "ring", "pipeline", "doubling", "star")
BASELINES = {"linear": ("ulysses", "megatron", "ring_attention"), "softmax": ("ring", "ulysses", "megatron")}
NO_LABEL = -100  # label of a token that has no next token; torch's cross_entropy ignores it


def spans_of(rank: int, ranks: int, layout: str) -> tuple[int, ...]:
    """Return the indices of the spans that a rank owns, ascending: (r,) of P spans, or (r, 2P-1-r) of 2P. One rank
    alone has one span, the sequence."""
    return (rank,) if layout == "contiguous" or ranks == 1 else (rank, 2 * ranks - 1 - rank)


def neighbours(rank: int, ranks: int, layout: str) -> tuple[int, int]:
    """Count the spans of a rank that another rank's span precedes, and those that another rank's span follows."""
    own, last = spans_of(rank, ranks, layout), len(spans_of(rank, ranks, layout)) * ranks - 1
    before = sum(span > 0 and span - 1 not in own for span in own)
    return before, sum(span < last and span + 1 not in own for span in own)


class Held(NamedTuple):
    """The consecutive tokens that one rank holds; `first` counts among that rank's tokens."""

    rank: int
    first: int
    tokens: int


def _shortened(values: Sequence[int]) -> str:
    return str(tuple(values)) if len(values) <= 12 else f"({', '.join(map(str, values[:10]))}, ... {values[-1]})"


@dataclass(frozen=True)
class SequenceParallel:
    """The settings of sequence parallelism: how a group of ranks cuts sequences, and how layers communicate.

    Make one per run.

    group     a process group (`mesh["sp"].get_group()`), or None for one device
    layout    "contiguous": rank r owns span r of P. "zigzag": it owns spans r and 2P-1-r of 2P, which gives every rank
              the same work in causal softmax attention. One rank alone has one span
    linear    how states are exchanged; all choices give the same results. "all_gather" is LASP-2 (arXiv 2502.07563),
              "ring" LASP (2404.02882), "pipeline" ZeCO (2507.01004), "doubling" a scan in ceil(log2(spans)) rounds.
              "auto" takes the fastest of these on the link (`exchange.choose`). "star" folds on one rank; it is a
              baseline
    softmax   how keys and values are exchanged: "all_gather" is AllGather-KV (arXiv 2407.21783). Baselines, in their
              original form: "ulysses" (arXiv 2309.14509) and "megatron" (Megatron-SP's volumes) cut heads inside the
              operator, for linear and softmax. Ring Attention (arXiv 2310.01889) is softmax="ring", and with the left
              product (q k^T) v linear="ring_attention". The operator refuses calls that a baseline cannot run
    kv_heads_per_gather   for softmax="all_gather": the number of key heads in one gather. The next gather is in flight
              during the attention to the present one. None, or more than there are, gathers all heads at once. One of 8
              needs a third of the memory for gathered keys and values
    keep_kv   for softmax="all_gather": keep the gathered keys and values for backward; False gathers them again there
    overlap   compute while collectives are in flight. False waits at once, for ablations; the results are bit-equal. A
              list of "linear", "softmax" and "conv" names the kinds of layer that overlap
    check     "sequence": all ranks compare the arguments of `shard` and these settings, once per shard. The comparison
              runs over the CPU: `shard` launches it, the first operator awaits it. If any differ, ValueError is raised
              on every rank. "calls": also compare a header before each collective; that adds one small collective to
              each, so it is for tests. False: ranks that differ hang, fail or compute wrong numbers. The ledger does
              not count comparisons
    link      the network for linear="auto"; None measures it
    """

    group: Group
    layout: str = "contiguous"
    linear: str = "all_gather"
    softmax: str = "all_gather"
    kv_heads_per_gather: int | None = None
    keep_kv: bool = True
    overlap: bool | Collection[str] = True
    check: str | bool = "sequence"
    link: Link | None = None

    def __post_init__(self) -> None:
        allowed = {
            "layout": LAYOUTS,
            "linear": (*STATE_EXCHANGES, "auto", *BASELINES["linear"]),
            "softmax": ("all_gather", *BASELINES["softmax"]),
            "check": CHECKS,
        }
        for name, choices in allowed.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"SequenceParallel.{name} must be one of {choices}, got {value!r}")
        if not isinstance(self.overlap, bool) and (isinstance(self.overlap, str) or set(self.overlap) - set(KINDS)):
            raise ValueError(
                f"SequenceParallel.overlap must be True, False or a list of kinds of {KINDS}, got {self.overlap!r}"
            )
        heads = self.kv_heads_per_gather
        if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
            raise ValueError(f"SequenceParallel.kv_heads_per_gather must be None or at least 1, got {heads!r}")

    def overlaps(self, kind: str) -> bool:
        """Tell whether layers of this kind compute while their collectives are in flight."""
        return self.overlap if isinstance(self.overlap, bool) else kind in self.overlap

    @property
    def rank(self) -> int:
        return groups.rank(self.group)

    @property
    def size(self) -> int:
        return groups.size(self.group)

    def shard(self, length: int, cu_seqlens: Sequence[int] | None = None) -> Shard:
        """Return this rank's part of a sequence of `length` tokens. Make one per batch.

        This call is collective: every rank of the group makes it, with the same arguments and in the same order among
        its other collectives. With `check` the ranks compare their arguments.

        cu_seqlens  bounds of packed documents as host ints, 0 ... length, never falling; documents may be empty. None:
                    the sequence is one document

        Raises ValueError for other bounds, and if the sequence has fewer tokens than spans.
        """
        bounds: Any = cu_seqlens
        fault: ValueError | None = None
        try:
            bounds = None if cu_seqlens is None else tuple(operator.index(bound) for bound in cu_seqlens)
        except TypeError:
            fault = ValueError(f"cu_seqlens must be whole numbers, got {cu_seqlens!r}")
        alike = {"length": length, "cu_seqlens": bounds, **self._settings}
        agreement = Agreement(alike, self.group) if self.check else None
        try:
            if fault is not None:
                raise fault
            shard = Shard(self, length, bounds, agreement=agreement)
        except ValueError:
            if agreement is not None:
                agreement.require()  # other ranks may accept their arguments, and would wait for this one
            raise
        _ = shard.positions  # made now: torch.compile would break where a layer first reads them
        return shard

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Return the settings that all ranks must share."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "group"}
        return settings | {"overlap": [kind for kind in KINDS if self.overlaps(kind)]}


@dataclass(eq=False)
class Shard:
    """The part of a sequence that one rank holds. Two shards of one sequence differ between ranks only in `sp.rank`.

    The sequence and its cut never change. During use the shard numbers the operator calls on it, and keeps the plans
    that operators make for it (`once`).

    sp          how the sequence is cut
    length      tokens in the whole sequence (L)
    cu_seqlens  bounds of the documents packed into the sequence, 0 ... L, without those of empty ones. None: the
                sequence is one document, and may be a batch
    calls       numbers the operator calls on this shard
    agreement   the comparison of the shard's arguments between ranks; None: they are not compared
    unit        consecutive tokens that no cut parts, a divisor of the length
    """

    sp: SequenceParallel
    length: int
    cu_seqlens: tuple[int, ...] | None = None
    calls: Iterator[int] = field(default_factory=itertools.count, repr=False)
    agreement: Agreement | None = field(default=None, repr=False)
    unit: int = 1
    _plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.cu_seqlens is not None:
            ends = (self.cu_seqlens[:1], self.cu_seqlens[-1:])
            falls = any(a > b for a, b in itertools.pairwise(self.cu_seqlens))
            if ends != ((0,), (self.length,)) or falls:
                raise ValueError(
                    f"cu_seqlens must rise from 0 to the {self.length} tokens of the sequence and never fall, got "
                    f"{_shortened(self.cu_seqlens)}"
                )
            self.cu_seqlens = tuple(dict.fromkeys(self.cu_seqlens))
        if self.length < self.span_count:
            raise ValueError(
                f"a sequence of {self.length} tokens cannot be cut into {self.span_count} spans "
                f'({self.sp.size} ranks, layout "{self.sp.layout}"): use longer sequences or fewer ranks'
            )

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Return the first token of every span of the sequence, and L."""
        count = self.sp.size * len(spans_of(0, self.sp.size, self.sp.layout))
        return tuple(i * (self.length // self.unit) // count * self.unit for i in range(count + 1))

    def stretched(self, steps: int) -> Shard:
        """Return the shard of a sequence with `steps` tokens in the place of each, on its rank and in its document.

        Its operator calls are numbered with those of this shard.
        """
        bounds = None if self.cu_seqlens is None else tuple(steps * bound for bound in self.cu_seqlens)
        return Shard(self.sp, steps * self.length, bounds, self.calls, self.agreement, steps * self.unit)

    @property
    def span_count(self) -> int:
        """Count the spans in the whole sequence."""
        return len(self.bounds) - 1

    @cached_property
    def own(self) -> tuple[int, ...]:
        """Return the indices of this rank's spans."""
        return spans_of(self.sp.rank, self.sp.size, self.sp.layout)

    @cached_property
    def owners(self) -> tuple[tuple[int, int], ...]:
        """Return, for every span of the sequence, its rank and its index among that rank's spans."""
        place = {
            span: (rank, slot)
            for rank in range(self.sp.size)
            for slot, span in enumerate(spans_of(rank, self.sp.size, self.sp.layout))
        }
        return tuple(place[span] for span in range(self.span_count))

    @cached_property
    def _held(self) -> tuple[Held, ...]:
        """Return, for every span of the sequence, the place of its tokens."""
        return tuple(
            Held(rank, sum(b - a for a, b in self.spans_at(rank)[:slot]), end - start)
            for (rank, slot), (start, end) in zip(self.owners, itertools.pairwise(self.bounds), strict=True)
        )

    def spans_at(self, rank: int) -> list[tuple[int, int]]:
        """Return [(start, end), ...] of a rank's spans, in sequence order."""
        return [(self.bounds[i], self.bounds[i + 1]) for i in spans_of(rank, self.sp.size, self.sp.layout)]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Return [(start, end), ...] of this rank's spans, in sequence order."""
        return self.spans_at(self.sp.rank)

    @cached_property
    def sequence(self) -> str:
        """Describe the sequence for headers: equal on ranks that hold the same sequence in the same layout."""
        if self.cu_seqlens is None:
            return f"{self.length} tokens {self.sp.layout}"
        bounds = zlib.crc32(repr(self.cu_seqlens).encode())
        return f"{self.length} tokens {self.sp.layout} in {len(self.cu_seqlens) - 1} documents {bounds:08x}"

    def header(self, tag: str, direction: str, call: int, note: str = "") -> Header:
        """Make the header of a collective on this sequence."""
        note = f"{note} {self.sequence}".strip()
        return Header(tag=tag, direction=direction, call=call, check=self.sp.check == "calls", note=note)

    def once(self, plan: Callable[Concatenate[Shard, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return plan(self, ...), made the first time and then kept, since all layers of a model ask for the same."""
        key = (plan, args, *kwargs.items())
        if key not in self._plans:
            self._plans[key] = plan(self, *args, **kwargs)
        made: R = self._plans[key]
        return made

    @property
    def tokens(self) -> int:
        """Count the tokens on this rank (T)."""
        return sum(self.span_lengths)

    @property
    def span_lengths(self) -> tuple[int, ...]:
        """Count the tokens in each of this rank's spans."""
        return tuple(end - start for start, end in self.spans)

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Return the tokens at which a document begins, except token 0: an initial state continues the one there."""
        return () if self.cu_seqlens is None else self.cu_seqlens[1:-1]

    @cached_property
    def local_boundaries(self) -> tuple[int, ...]:
        """Return this rank's local tokens at which a document begins."""
        local, offset = [], 0
        for start, end in self.spans:
            here = slice(bisect_left(self.boundaries, start), bisect_left(self.boundaries, end))
            local += [offset + token - start for token in self.boundaries[here]]
            offset += end - start
        return tuple(local)

    @cached_property
    def broken(self) -> tuple[int, ...]:
        """Return the spans of the sequence in which a document begins: no state passes through them."""
        return tuple(sorted({bisect_right(self.bounds, token) - 1 for token in self.boundaries}))

    def document_start(self, token: int) -> int:
        """Return the first token of the document that holds this token of the sequence."""
        before = bisect_right(self.boundaries, token)
        return self.boundaries[before - 1] if before else 0

    def document_end(self, token: int) -> int:
        """Return the token after the last one of the document that holds this token of the sequence."""
        before = bisect_right(self.boundaries, token)
        return self.boundaries[before] if before < len(self.boundaries) else self.length

    @cached_property
    def positions(self) -> Tensor:
        """Return the position of each local token in its document, LongTensor [T]."""
        first = torch.tensor([0, *self.boundaries])
        tokens = torch.cat([torch.arange(start, end) for start, end in self.spans])
        return tokens - first[torch.searchsorted(first, tokens, right=True) - 1]

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's tokens of x, whose `dim` is the whole sequence. The gradient is zero outside them."""
        if x.shape[dim] != self.length:
            raise ValueError(f"take: dim {dim} of x has {x.shape[dim]} tokens, the sequence has {self.length}")
        return torch.cat([x.narrow(dim, start, end - start) for start, end in self.spans], dim)

    @eager
    def gather(self, x_local: Tensor, dim: int = 1) -> Tensor:
        """Return the whole sequence; every rank gives its tokens along `dim`. Backward sums over ranks."""
        self.require_agreement()
        self.require_tokens("gather", x=x_local.shape[dim])
        return _Gather.apply(self, x_local, dim)

    def labels(self, tokens_BL: Tensor) -> Tensor:
        """Return each local token's next token in its document [B,T], -100 where there is none: shifted, then cut."""
        labels_BL = tokens_BL.roll(-1, 1)
        last = torch.tensor([end - 1 for end in (*self.boundaries, self.length)])
        return self.take(labels_BL.index_fill_(1, to_device(last, tokens_BL.device), NO_LABEL), 1)

    def require_agreement(self) -> None:
        """Raise ValueError, on every rank, if the ranks were given different sequences or strategies."""
        if self.agreement is not None:
            self.agreement.require()

    def require_tokens(self, operator: str, **lengths: int) -> None:
        """Raise ValueError unless every named tensor has this rank's number of tokens."""
        for name, length in lengths.items():
            if length != self.tokens:
                raise ValueError(
                    f"{operator}: {name} has {length} tokens, rank {self.sp.rank} of {self.sp.size} holds "
                    f"{self.tokens} of {self.length}; cut it with shard.take"
                )

    def require_batch(self, operator: str, x: Tensor) -> None:
        """Raise ValueError unless x is one row of tokens, if documents are packed."""
        if self.cu_seqlens is not None and x.shape[0] != 1:
            raise ValueError(
                f"{operator}: packed documents (cu_seqlens) are one row of tokens, but the batch is {x.shape[0]}; lay "
                "the rows end to end and give their bounds as cu_seqlens"
            )

    # Tensors in flight have the longest rank's number of tokens; a shorter rank pads its own with zeros.

    @cached_property
    def _longest(self) -> int:
        return max(sum(end - start for start, end in self.spans_at(rank)) for rank in range(self.sp.size))

    def pad(self, x_local: Tensor, dim: int) -> Tensor:
        """Pad a rank's tokens with zeros to the number of the longest rank."""
        short = self._longest - x_local.shape[dim]
        return F.pad(x_local, (0, 0) * (x_local.ndim - 1 - dim % x_local.ndim) + (0, short)) if short else x_local

    def join(self, x_P: Tensor, dim: int) -> Tensor:
        """Join the padded parts of all ranks [P, ...] into the whole sequence; `dim` holds the tokens of a part."""
        return torch.cat([x_P[span.rank].narrow(dim, span.first, span.tokens) for span in self._held], dim)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Split the whole sequence into the padded parts of all ranks [P, ...]: the adjoint of `join`."""
        shape = [self.sp.size, *x.shape]
        shape[dim % x.ndim + 1] = self._longest
        x_P = x.new_zeros(shape)
        for span, x_span in zip(self._held, x.tensor_split(self.bounds[1:-1], dim), strict=True):
            x_P[span.rank].narrow(dim, span.first, span.tokens).copy_(x_span)
        return x_P


def held(shard: Shard, first: int, end: int) -> Iterator[Held]:
    """Yield the pieces of a range of the sequence, each held by one rank, in sequence order."""
    span = bisect_right(shard.bounds, first) - 1
    while first < end:
        whole, stop = shard._held[span], min(end, shard.bounds[span + 1])
        yield Held(whole.rank, whole.first + first - shard.bounds[span], stop - first)
        first, span = stop, span + 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Shard, x_local: Tensor, dim: int) -> Tensor:
        ctx.shard, ctx.dim, ctx.call = shard, dim, next(shard.calls)
        header = shard.header("gather", "forward", ctx.call)
        return shard.join(collectives.start_all_gather(shard.pad(x_local, dim), shard.sp.group, header).wait(), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, Tensor, None]:
        shard, dim = ctx.shard, ctx.dim
        header = shard.header("gather", "backward", ctx.call)
        mine = collectives.start_reduce_scatter(shard.split(dx, dim), shard.sp.group, header).wait()
        return None, mine.narrow(dim, 0, shard.tokens), None
