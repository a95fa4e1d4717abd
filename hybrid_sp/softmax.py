"""Softmax attention whose sequence is cut over ranks: AllGather-KV (Llama 3, arXiv 2407.21783; LASP-2H, 2502.07563).

    forward     send K, V | own keys | wait | the keys of other ranks, merged by log-sum-exp
    backward    the other keys' dK, dV -> send them back | own keys | wait, add the own dK, dV

What a rank receives is `exchange/keys.py`: all keys, or the few that a window or a document leaves to be seen. The mask
is a list of parts (`kernels/parts.py`), those over own keys and those over what is received.

Three autograd nodes share one `Call`. Backward needs the merged output and its lse in both attention nodes, so `_Rest`
keeps them and hands them to `_Own` within the pass, with its dq; `_Own` hands its dk, dv to `_Send`. Sums are fp32 and
rounded once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .exchange.halo import Plan, Range, rows_of_others
from .exchange.keys import Keys, Ranges, Whole
from .kernels import parts
from .kernels.parts import Part
from .kernels.softmax import attend, attend_backward, merge
from .layout import Shard
from .overlap import Call, recorded
from .public import compute_dtype, operator, require, shard_of


@operator
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shard: Shard | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over the sequence of which `shard` holds this rank's tokens.

        o_t = sum over s of softmax_s(scale * q_t . k_s) v_s

    over the tokens s of the document of t; where causal s <= t, and with a window also s > t - window.

    q       [B,T,Hq,D]
    k, v    [B,T,Hkv,D], Hq a multiple of Hkv; query head h reads key head h // (Hq // Hkv). K and V travel before heads
            are repeated
    window  number of tokens that a token sees, itself included; needs causal. None sees all
    scale   None is D**-0.5
    shard   this rank's part of the sequence, None for one device, where with causal=False k and v may have a length of
            their own

    Returns o [B,T,Hq,D] in the dtype of q. Each rank receives 2 (P-1) B T Hkv D numbers forward (dtype of k) and as
    many backward (fp32, or fp64). With a window or packed documents it receives only the tokens that its spans see
    before them, 2 B (window-1) Hkv D numbers for each span at most (backward, what the others see of its tokens),
    unless some rank sees all others. The work of a window is T * window. Raises ValueError for shapes, dtypes and
    windows that do not fit, before any communication.

    Sources: AllGather-KV, arXiv 2407.21783, section 3.3.2; arXiv 2502.07563, algorithm 7. The window is that of Mistral
    (2310.06825, section 2).
    """
    alone, shard = shard is None, shard_of(shard, q)
    _check(q, k, v, shard, causal, window, alone, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plan = _plan(shard, causal, window, k.shape[1])
    with Call(shard, "softmax") as call:
        carry = _Carry(call)
        token = _Send.apply(carry, plan.keys, k, v)
        done, o, lse = _Own.apply(carry, token, q, k, v, plan.own, scale)
        return _Rest.apply(carry, plan.keys, token, done, q, o, lse, plan.rest, scale)


class _Reading(NamedTuple):
    """Queries [first, first + queries) of a rank see these ranges of the sequence, which other ranks hold."""

    first: int
    queries: int
    ranges: list[Range]


class _Plan(NamedTuple):
    """What this rank computes with its own keys, and with those that it receives."""

    own: list[Part]
    rest: list[Part]
    keys: Keys


@functools.lru_cache(maxsize=16)  # the layers of a model ask the same of a shard
def _plan(shard: Shard, causal: bool, window: int | None, own_keys: int) -> _Plan:
    ranks = range(shard.sp.size)
    readings = [list(_earlier(shard, rank, window) if causal else _documents(shard, rank)) for rank in ranks]
    wanted = [[read for reading in here for read in reading.ranges] for here in readings]
    keys: Keys = Whole(shard) if _somebody_needs_all(shard, wanted) else Ranges(Plan(shard, wanted))
    here = readings[shard.sp.rank]
    reads = [(reading, end - first) for reading in here for first, end in reading.ranges]
    rest = []
    for (reading, tokens), place in zip(reads, keys.places(wanted[shard.sp.rank]), strict=True):
        rest += parts.earlier(reading.first, reading.queries, place, tokens, window)
    if causal:
        bounds = {0, *itertools.accumulate(shard.span_lengths), *shard.local_boundaries}
        own = [part for a, b in itertools.pairwise(sorted(bounds)) for part in parts.own(a, b - a, window)]
    else:
        own = [Part("full", r.first, r.queries, r.first, r.queries, fresh=True) for r in here]
        own = own if shard.boundaries else [own[0]._replace(keys=own_keys)]
    return _Plan(own, rest, keys)


def _earlier(shard: Shard, rank: int, window: int | None) -> Iterator[_Reading]:
    """Causal: the first document of each span, and what lies before it."""
    place = 0
    for start, end in shard.spans_at(rank):
        first = shard.document_start(start)
        if window is not None:
            first = max(first, start - window + 1)
        queries = min(end, shard.document_end(start)) - start
        yield _Reading(place, queries, [(first, start)] if first < start else [])
        place += end - start


def _documents(shard: Shard, rank: int) -> Iterator[_Reading]:
    """Without a mask: each document that a rank has tokens of, which lie one after the other, and its other tokens."""
    spans, place = shard.spans_at(rank), 0
    runs: dict[int, tuple[int, int]] = {}
    for start, end in spans:
        while start < end:
            stop = min(end, shard.document_end(start))
            first, tokens = runs.get(shard.document_start(start), (place, 0))
            runs[shard.document_start(start)] = first, tokens + stop - start
            place, start = place + stop - start, stop
    for start, (first, tokens) in runs.items():
        end = shard.document_end(start)
        held = [edge for a, b in spans if a < end and start < b for edge in (max(a, start), min(b, end))]
        edges = [start, *held, end]
        yield _Reading(first, tokens, [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b])


def _somebody_needs_all(shard: Shard, wanted: list[list[Range]]) -> bool:
    """Whether some rank would receive as many tokens as in the gather, or more: then the gather serves all."""
    for rank, ranges in enumerate(wanted):
        missing = shard.length - sum(end - start for start, end in shard.spans_at(rank))
        if 0 < missing <= rows_of_others(shard, rank, ranges):
            return True
    return False


class _Carry:
    """What one backward pass hands from node to node: `_Rest` to `_Own` to `_Send`."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.whole: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # do, merged o and lse, dq of the rest
        self.own: tuple[Tensor, Tensor] | None = None  # dk, dv of the own parts

    def take_whole(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        whole, self.whole = self.whole, None
        assert whole is not None, "backward of the own parts before that of the rest"
        return whole

    def take_own(self) -> tuple[Tensor, Tensor]:
        own, self.own = self.own, None
        assert own is not None, "backward of sending before that of the own parts"
        return own


class _Send(torch.autograd.Function):
    """Forward launches the exchange of K and V; backward waits for the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, carry: _Carry, keys: Keys, k: Tensor, v: Tensor) -> Tensor:
        ctx.carry, ctx.keys, ctx.dtype = carry, keys, k.dtype
        header = carry.call.header("forward", "grad" if any(ctx.needs_input_grad) else "no grad")
        carry.call.launch_forward(lambda: keys.launch(header, k, v))
        return k.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor) -> tuple[None, None, Tensor, Tensor]:
        received = ctx.carry.call.backward_result()
        dk, dv = ctx.carry.take_own()
        ctx.keys.add(dk, dv, received)
        return None, None, dk.to(ctx.dtype), dv.to(ctx.dtype)


class _Own(torch.autograd.Function):
    """Attention of the local queries to the local keys, while the others are in flight.

    Autograd sees a token alone: o and lse are `_Rest`'s to merge into, and do comes here by the carry, in its dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, carry: _Carry, token: Tensor, q: Tensor, k: Tensor, v: Tensor, own: list[Part], scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.carry, ctx.own, ctx.scale = carry, own, scale
        ctx.save_for_backward(q, k, v)
        o, lse = (q.new_empty(shape, dtype=compute_dtype(q)) for shape in (q.shape, q.shape[:3]))
        _attend(own, o, lse, q, k, v, scale)
        ctx.mark_non_differentiable(o, lse)
        return q.new_empty(0), o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_done: Tensor, *_: None) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        do, o, lse, dq = ctx.carry.take_whole()
        dk, dv = (torch.zeros_like(x, dtype=dq.dtype) for x in (k, v))
        _attend_backward(ctx.own, (dq, dk, dv), do, q, k, v, o, lse, ctx.scale)
        ctx.carry.own = (dk, dv)
        d_token = dq.new_empty(0)  # orders this node before `_Send`'s; dk and dv go there with the others' share
        return None, d_token, dq.to(q.dtype), None, None, None, None


class _Rest(torch.autograd.Function):
    """Waits for the other keys, attends to them, and merges."""

    @staticmethod
    def forward(
        ctx: Any,
        carry: _Carry,
        keys: Keys,
        token: Tensor,
        done: Tensor,
        q: Tensor,
        o: Tensor,
        lse: Tensor,
        rest: list[Part],
        scale: float,
    ) -> Tensor:
        ctx.carry, ctx.keys, ctx.rest, ctx.scale = carry, keys, rest, scale
        (kv,) = recorded(lambda: (carry.call.forward_result(),))
        _attend(rest, o, lse, q, kv[0], kv[1], scale)
        out = o.to(q.dtype, copy=True)
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, kv, o, lse = ctx.saved_tensors
        dq, d_kv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, kv))
        _attend_backward(ctx.rest, (dq, d_kv[0], d_kv[1]), do, q, kv[0], kv[1], o, lse, ctx.scale)
        ctx.carry.whole = (do, o, lse, dq)
        d_token = None
        if ctx.needs_input_grad[2]:
            header = ctx.carry.call.header("backward")
            ctx.carry.call.launch_backward(lambda: ctx.keys.launch_backward(header, d_kv))
            d_token = dq.new_empty(0)
        return None, None, d_token, dq.new_empty(0), None, None, None, None, None


def _attend(todo: list[Part], o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Merge the attention of these parts into o and lse, in place."""
    for part in todo:
        seen = [_load(part, x) for x in (part.of_queries(q), part.of_keys(k), part.of_keys(v))]
        found = attend(seen[0], seen[1], seen[2], part.kind != "full", scale)
        o_part, lse_part = part.of_queries(o), part.of_queries(lse)
        o_new, lse_new = (_store(part, x, o_part.shape[:2]) for x in found)
        if not part.fresh:
            o_new, lse_new = merge(o_part, lse_part, o_new, lse_new)
        o_part.copy_(o_new)
        lse_part.copy_(lse_new)


def _attend_backward(
    todo: list[Part],
    grads: tuple[Tensor, Tensor, Tensor],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    """Add the gradients of these parts to dq, dk and dv, in place, from o and lse of the whole."""
    for part in todo:
        do_, q_, o_, lse_ = (_load(part, part.of_queries(x)) for x in (do, q, o, lse))
        k_, v_ = (_load(part, part.of_keys(x)) for x in (k, v))
        found = attend_backward(do_, q_, k_, v_, o_, lse_, part.kind != "full", scale)
        outputs = part.of_queries(grads[0]), part.of_keys(grads[1]), part.of_keys(grads[2])
        for x, grad in zip(outputs, found, strict=True):
            x += _store(part, grad, x.shape[:2])


def _load(part: Part, x: Tensor) -> Tensor:
    """[B,repeats,T,...] as a batch for the kernel; a flipped part backwards, which makes a causal square of it."""
    x = x.flatten(0, 1)
    return x.flip(1) if part.kind == "flipped" else x


def _store(part: Part, x: Tensor, batch: torch.Size) -> Tensor:
    """Back from the kernel, [B,repeats,T,...]."""
    return (x.flip(1) if part.kind == "flipped" else x).unflatten(0, batch)


def _check(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, causal: bool, window: int | None, alone: bool, backend: str
) -> None:
    name = "softmax_attention"
    require(backend in ("auto", "torch"), name, f'backend must be "auto" or "torch", got {backend!r}')
    require(q.ndim == k.ndim == v.ndim == 4, name, "q, k and v must be [batch, tokens, heads, dim]")
    require(k.shape == v.shape, name, f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    require(
        q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3],
        name,
        f"q {tuple(q.shape)} and k {tuple(k.shape)} must share batch and head dim",
    )
    require(
        q.shape[2] % k.shape[2] == 0, name, f"q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} key heads"
    )
    require(q.dtype == k.dtype == v.dtype, name, f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    require(q.dtype.is_floating_point, name, f"q, k, v must be floating point, got {q.dtype}")
    require(window is None or window >= 1, name, f"window must be at least 1 token, the token itself, got {window}")
    require(window is None or causal, name, "a window needs causal=True")
    shard.require_tokens(name, q=q.shape[1])
    shard.require_batch(name, q)
    if causal or not alone:
        shard.require_tokens(name, k=k.shape[1])
