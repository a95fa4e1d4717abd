"""The linear layers under Ring Attention, by their left product (q k^T * D) v: the baseline of LASP-2 (2502.07563).

Keys and values travel (`ring_attention.py`), and each rank multiplies them with its queries (`left_product.py`). No
state is made. The decay between a query and a key of another span has three parts, none of them positive:

    read       from the beginning of the query's span to the query
    between    over the spans between
    written    from the key to the end of its span
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import compute_dtype, require
from ..comm import collectives
from ..comm.pending import Header
from ..exchange.strategy import GRADIENT, TokenSizes, TokenStrategy
from ..exchange.visible import tiles_by_rank
from ..kernels.softmax.tiles import Tile
from ..overlap import Call
from ..shard import Shard, spans_of
from ..transfer import to_device
from . import left_product as quadratic
from .ring_attention import Block, Ring


def left_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    shard: Shard,
    causal: bool,
    normalize: bool,
    scale: float,
    unsupported: dict[str, Any],
) -> Tensor:
    """Compute linear attention as in `linear_attention`: q, k [B,T,G,K], v [B,T,H,V], log_decay None, [H] or [B,T,H].

    Returns o [B,T,H,V] in the dtype of sums; with normalize it has one column more, the sum that normalises.

    Each rank receives (P-1) B T (G K + H V) numbers forward, in the dtype of k. Backward it receives as many again, and
    P B T (G K + H V) in the dtype of sums. A decay per token adds H numbers to each token's, in the dtype of sums, and
    an exchange of the spans' totals.

    Raises ValueError if any of the `unsupported` is given (bonus, states), and for decays of key channels: a product of
    q and k has no place for them.
    """
    name = "linear_attention"
    for what, given in unsupported.items():
        require(given is None, name, f'linear="ring_attention" takes no {what}')
    require(
        log_decay is None or log_decay.ndim < 4,
        name,
        'linear="ring_attention" takes log_decay [H] or [B,T,H], not one per key channel',
    )
    g = v.new_zeros(v.shape[2], dtype=compute_dtype(q)) if log_decay is None else log_decay.to(compute_dtype(q))
    return _LeftProduct.apply(
        Call(shard, "linear"), shard.once(tiles_by_rank, causal, None), q, k, v, g, normalize, scale
    )


class _LeftProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        parts: list[list[Tile]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        normalize: bool,
        scale: float,
    ) -> Tensor:
        header = call.header("forward", "grad" if any(ctx.needs_input_grad) else "no grad")
        # 1. Gather the total decay of every span, for the decays between spans.
        form, decays = _Layout(k, v, normalize), _Decays(call.shard, g, len(q), _totals(call.shard, g, header))
        q_ = form.heads_first(q) * scale
        o = q_.new_zeros(*q_.shape[:3], v.shape[3] + normalize)

        # 2. Multiply this rank's queries with a block.
        def visit(source: int, block: Block) -> None:
            k_, v_ = form.opened(block[0])
            written = decays.written(source, block)
            for part in parts[source]:
                t, s = _runs(part)
                here = o[:, :, t], q_[:, :, t], k_[:, :, s], v_[:, :, s]
                if part.kind == "causal":
                    quadratic.causal_forward(*here, decays.g[:, :, t])
                else:
                    read = decays.read[:, :, t] + decays.between(part, source)
                    quadratic.full_forward(*here, read, written[:, :, s])

        # 3. Do so with every block that comes around.
        block = form.block(call.shard, k, v, decays)
        Ring(call, header, block).around(block, visit)
        ctx.call, ctx.tiles, ctx.form, ctx.scale = call, parts, form, scale
        ctx.save_for_backward(q, k, v, g, decays.totals)
        return rearrange(o, "B H T V -> B T H V")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, g, totals = ctx.saved_tensors
        call, form, header = ctx.call, ctx.form, ctx.call.header("backward")
        decays, sums = _Decays(call.shard, g, len(q), totals), _DecaySums(call.shard, g, len(q))
        q_, do_ = form.heads_first(q) * ctx.scale, rearrange(do, "B T H V -> B H T V").contiguous()
        dq_ = torch.zeros_like(q_)

        # 1. Compute a block's gradients. dq stays here; dk, dv and d_written travel on with the block.
        def visit(source: int, block: Block) -> Tensor:
            k_, v_ = form.opened(block[0])
            written = decays.written(source, block)
            dk_, dv_, d_written = (torch.zeros_like(x) for x in (k_, v_, k_[..., 0]))
            for part in ctx.tiles[source]:
                t, s = _runs(part)
                grads = dq_[:, :, t], dk_[:, :, s], dv_[:, :, s]
                here = do_[:, :, t], q_[:, :, t], k_[:, :, s], v_[:, :, s]
                if part.kind == "causal":
                    sums.dg[:, :, t] += quadratic.causal_backward(grads, *here, decays.g[:, :, t])
                else:
                    read = decays.read[:, :, t] + decays.between(part, source)
                    d_read, d_written_part = quadratic.full_backward(grads, *here, read, written[:, :, s])
                    d_written[:, :, s] += d_written_part
                    sums.add(part, source, d_read)
            return form.closed(dk_, dv_, sums.travelling(source, d_written))

        # 2. Do so with every block that comes around; the gradients of the own block come home.
        block = form.block(call.shard, k, v, decays)
        home = Ring(call, header, block).collect(block, visit)
        dk, dv, d_written = form.split(home[:, : k.shape[1]])
        dq = form.tokens_first(dq_) * ctx.scale
        # 3. Turn the gradients of sums of decays into those of the decays.
        dg = sums.total(d_written, header)
        return None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, None, None


def _runs(part: Tile) -> tuple[slice, slice]:
    """Return the slices of a part's queries and keys."""
    return slice(part.first, part.first + part.queries), slice(part.key, part.key + part.keys)


class _Layout:
    """The layouts of q, k and v, and the moves between them.

    outside    [B,T,G,D]
    in flight  one row of numbers per token
    products   heads first, in the dtype of sums, with as many key heads as value heads; with `normalize` values have a
               last column of ones
    """

    def __init__(self, k: Tensor, v: Tensor, normalize: bool) -> None:
        self.key_dims, self.value_dims, self.normalize = k.shape[2:], v.shape[2:], normalize

    def block(self, shard: Shard, k: Tensor, v: Tensor, decays: _Decays) -> Block:
        """Return the block that this rank sends around."""
        kv = shard.pad(torch.cat([k.flatten(2), v.flatten(2)], -1), 1)
        return (kv,) if decays.known else (kv, shard.pad(decays.own_written, 2))

    def opened(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Return k [B,H,T,K] and v [B,H,T,V] of a block in flight."""
        k, v = kv.split([self.key_dims.numel(), self.value_dims.numel()], -1)
        v_ = self.heads_first(v.unflatten(-1, self.value_dims))
        return self.heads_first(k.unflatten(-1, self.key_dims)), F.pad(v_, (0, 1), value=1.0) if self.normalize else v_

    def closed(self, dk: Tensor, dv: Tensor, d_written: Tensor) -> Tensor:
        """Return the gradients of a block as they travel; d_written is [B,T,H], or [B,T,0] if it does not travel."""
        dv = rearrange(dv[..., : self.value_dims[1]], "B H T V -> B T (H V)")
        return torch.cat([self.tokens_first(dk).flatten(2), dv, d_written], -1)

    def split(self, grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dk [B,T,G,K], dv [B,T,H,V] and d_written."""
        sizes = [self.key_dims.numel(), self.value_dims.numel()]
        dk, dv, d_written = grads.split([*sizes, grads.shape[-1] - sum(sizes)], -1)
        return dk.unflatten(-1, self.key_dims), dv.unflatten(-1, self.value_dims), d_written

    def heads_first(self, x: Tensor) -> Tensor:
        repeats = self.value_dims[0] // x.shape[2]
        return repeat(x.to(compute_dtype(x)), "B T G D -> B (G R) T D", R=repeats).contiguous()

    def tokens_first(self, dx: Tensor) -> Tensor:
        """Return the gradient of a tensor of key heads: summed over the value heads that share one."""
        return reduce(dx, "B (G R) T D -> B T G D", "sum", G=self.key_dims[0])


class _Decays:
    """The log decays g of this rank's tokens [B,H,T], and their sums between spans.

    known   every rank knows all of them: they are fixed per head
    read    from the beginning of a token's span to the token
    """

    def __init__(self, shard: Shard, g: Tensor, batch: int, totals: Tensor) -> None:
        self.shard, self.totals, self.known = shard, totals, g.ndim == 1
        self._fixed = g
        self.g = _expanded(g, batch, shard.tokens) if self.known else rearrange(g, "B T H -> B H T")
        self.read = _by_span(quadratic.through, self.g, shard, shard.sp.rank)

    @property
    def own_written(self) -> Tensor:
        """Return the log decay from each of this rank's tokens to the end of its span."""
        return _by_span(quadratic.after, self.g, self.shard, self.shard.sp.rank)

    def written(self, source: int, block: Block) -> Tensor:
        """Return the log decay from each token of a rank to the end of its span."""
        if not self.known:
            return block[1]
        tokens = sum(_lengths(self.shard, source))
        return _by_span(quadratic.after, _expanded(self._fixed, 1, tokens), self.shard, source)

    def between(self, part: Tile, source: int) -> Tensor:
        """Return the log decay over the spans between those of a part's keys and of its queries, [B,H,1]."""
        return self.totals[_spans_between(self.shard, part, source)].sum(0).unsqueeze(-1)


class _DecaySums:
    """The gradients of `_Decays`, added up part by part: of g, of `read`, of the spans' totals, and of fixed decays."""

    def __init__(self, shard: Shard, g: Tensor, batch: int) -> None:
        self.shard, self.known = shard, g.ndim == 1
        self.dg = g.new_zeros(batch, g.shape[-1], shard.tokens)
        self.d_read, self.d_fixed = torch.zeros_like(self.dg), g.new_zeros(g.shape[-1])
        self.d_totals = g.new_zeros(shard.span_count, batch, g.shape[-1])

    def add(self, part: Tile, source: int, d_read: Tensor) -> None:
        """Add one part's gradient to the side of its queries, and to the totals of the spans between."""
        self.d_read[:, :, _runs(part)[0]] += d_read
        self.d_totals[_spans_between(self.shard, part, source)] += d_read.sum(-1)

    def travelling(self, source: int, d_written: Tensor) -> Tensor:
        """Return the keys' side that goes home with the block, [B,T,H]; [B,T,0] if the decays are known."""
        if not self.known:
            return rearrange(d_written, "B H T -> B T H")
        tokens = sum(_lengths(self.shard, source))
        dg = _by_span(quadratic.after_backward, d_written[:, :, :tokens], self.shard, source)
        self.d_fixed += dg.sum((0, 2))
        return rearrange(d_written[:, :0], "B H T -> B T H")

    def total(self, d_written: Tensor, header: Header) -> Tensor:
        """Return the gradient of g in its own shape, this rank's contribution; d_written came home [B,T,H]."""
        shard, me = self.shard, self.shard.sp.rank
        dg = self.dg + _by_span(quadratic.through_backward, self.d_read, shard, me)
        if self.known:
            return dg.sum((0, 2)) + torch.einsum("n,nbh->h", _all_lengths(shard, dg), self.d_totals) + self.d_fixed
        by_rank = [self.d_totals[list(spans_of(rank, shard.sp.size, shard.sp.layout))] for rank in range(shard.sp.size)]
        d_totals = collectives.start_reduce_scatter(torch.stack(by_rank), shard.sp.group, header).wait()
        dg += _by_span(quadratic.after_backward, rearrange(d_written, "B T H -> B H T"), shard, me)
        for part, d_total in zip(dg.split(_lengths(shard, me), 2), d_totals, strict=True):
            part += d_total.unsqueeze(-1)
        return rearrange(dg, "B H T -> B T H")


def _totals(shard: Shard, g: Tensor, header: Header) -> Tensor:
    """Return the log decay of every span of the sequence [n,B,H]; known ones [n,1,H], without communication."""
    if g.ndim == 1:
        return _all_lengths(shard, g)[:, None, None] * g
    own = torch.stack([span.sum(1) for span in g.split(shard.span_lengths, 1)])
    own_P = collectives.start_all_gather(own, shard.sp.group, header).wait()
    return torch.stack([own_P[owner] for owner in shard.owners])


def _spans_between(shard: Shard, part: Tile, source: int) -> slice:
    """Return the spans of the sequence between that of a part's keys, on the rank `source`, and that of its queries."""
    return slice(_span(shard, source, part.key) + 1, _span(shard, shard.sp.rank, part.first))


def _span(shard: Shard, rank: int, token: int) -> int:
    """Return the span of the sequence that holds a rank's local token."""
    second = bisect.bisect_right(_lengths(shard, rank)[:-1], token)
    return spans_of(rank, shard.sp.size, shard.sp.layout)[second]


def _lengths(shard: Shard, rank: int) -> list[int]:
    return [end - start for start, end in shard.spans_at(rank)]


def _all_lengths(shard: Shard, like: Tensor) -> Tensor:
    """Count the tokens in every span of the sequence [n]."""
    return to_device(torch.tensor([b - a for a, b in itertools.pairwise(shard.bounds)], dtype=like.dtype), like.device)


def _by_span(function: Callable[[Tensor], Tensor], x: Tensor, shard: Shard, rank: int) -> Tensor:
    """Apply `function` to each span of a rank, x [B,H,T]."""
    return torch.cat([function(part) for part in x.split(_lengths(shard, rank), 2)], 2)


def _expanded(fixed: Tensor, batch: int, tokens: int) -> Tensor:
    return fixed[None, :, None].expand(batch, -1, tokens)


def received(sizes: TokenSizes) -> tuple[int, int]:
    """Return the bytes as in Ring Attention of softmax layers; a decay per token adds its own, and m totals per
    rank."""
    if sizes.decays > sizes.heads:
        raise ValueError('linear="ring_attention" takes no decay per key channel and no delta rule')
    numbers, decays, ranks = sizes.keys + sizes.values, sizes.decays * GRADIENT, sizes.ranks
    totals = sizes.batch * len(spans_of(0, ranks, sizes.layout)) * decays
    around = (ranks - 1) * (sizes.rows * (numbers * sizes.element + decays) + totals)
    home = ranks * sizes.rows * (numbers * GRADIENT + decays) if ranks > 1 else 0
    return around, around + home


STRATEGY = TokenStrategy("ring attention by left product", received)
