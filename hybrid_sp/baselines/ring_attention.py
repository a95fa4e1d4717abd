"""The baseline Ring Attention (arXiv 2310.01889): keys and values travel around, and each rank attends to every block.

    forward     P-1 hops of a block: the next one is in flight while the present one is attended to
    backward    the same again, and the sum of the block's gradients travels one hop behind it, P hops to come home

No received block is kept for backward. Under every mask, all blocks pass all ranks. The linear layers' form is the left
product (q k^T * D) v, as in the comparison of the LASP-2 paper (arXiv 2502.07563).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..comm import messages
from ..comm.pending import Header, Pending
from ..exchange.kv import columns
from ..exchange.strategy import GRADIENT, TokenSizes, TokenStrategy
from ..exchange.visible import tiles_by_rank
from ..kernels.softmax.attend import add_sinks, empty_output, sinks_backward
from ..kernels.softmax.tiled import attend_tiles, attend_tiles_backward
from ..kernels.softmax.tiles import Tile
from ..overlap import Call
from ..shard import Shard

Block = tuple[Tensor, ...]  # the tensors that a rank sends around, equal in shape on all ranks


class Ring:
    """The pass around the ranks, forward or backward, in one call of an operator."""

    def __init__(self, call: Call, header: Header, block: Block) -> None:
        self.call, self.numbers = call, itertools.count()
        self.rank, self.size, self.group = call.sp.rank, call.sp.size, call.sp.group
        self.header = messages.open_exchange(header, "ring", block[0], self.group)

    def around(self, block: Block, visit: Callable[[int, Block], None]) -> None:
        """Visit this rank's block, that of the rank before it, and so on, each while the next is in flight."""
        for hop in range(self.size):
            # 1. Send the block on, and ask for the next one.
            arriving = self._shift(block) if hop + 1 < self.size else Pending(lambda: ())
            # 2. Compute with the block in the meantime.
            try:
                with self.call.phase("block", self.header.direction, block[0]):
                    visit((self.rank - hop) % self.size, block)
            finally:
                block = arriving.wait()

    def collect(self, block: Block, visit: Callable[[int, Block], Tensor]) -> Tensor:
        """Return the sum over ranks of the tensors that each rank's `visit` makes from this rank's block."""
        sums = Pending(lambda: ())  # gradients of the present block, on their way from the rank before

        def add(source: int, here: Block) -> None:
            nonlocal sums
            # 1. Compute this rank's part of the block's gradients.
            try:
                part = visit(source, here)
            except BaseException:
                sums.drain()
                raise
            # 2. Add the sum of the ranks before, and send it on.
            for earlier in sums.wait():
                part += earlier
            sums = self._shift((part,))

        self.around(block, add)
        return sums.wait()[0]

    def _shift(self, block: Block) -> Pending:
        """Launch one hop: this block to the next rank, the block of the rank before to this one."""
        hops = [messages.start_shift(x, next(self.numbers), self.group, self.header) for x in block]
        pending = Pending(lambda: tuple(hop.wait() for hop in hops))
        if self.call.sp.overlaps(self.call.tag):
            return pending
        arrived = pending.wait()
        return Pending(lambda: arrived)


def ring_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    shard: Shard,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> Tensor:
    """Compute softmax attention as in `softmax_attention`; q [B,T,H,D], k [B,T,G,D], v [B,T,G,V], sinks [H]."""
    tiles = shard.once(tiles_by_rank, causal, window)
    return _Softmax.apply(Call(shard, "softmax"), tiles, q, k, v, sinks, scale, backend)


class _Softmax(torch.autograd.Function):
    """The node of one call. Blocks are merged by their log-sum-exp, in the dtype of sums."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        tiles: list[list[Tile]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        scale: float,
        backend: str,
    ) -> Tensor:
        ctx.call, ctx.tiles, ctx.scale, ctx.backend = call, tiles, scale, backend
        o, lse = empty_output(q, v.shape[-1])

        # 1. Attend to a block, and merge by log-sum-exp.
        def visit(source: int, block: Block) -> None:
            k_, v_ = columns(block[0], (k, v))
            attend_tiles(tiles[source], o, lse, q, k_, v_, scale, backend)

        # 2. Do so with every block that comes around.
        block = (call.shard.pad(torch.cat([k, v], -1), 1),)
        header = call.header("forward", "grad" if any(ctx.needs_input_grad) else "no grad")
        Ring(call, header, block).around(block, visit)
        if sinks is not None:
            add_sinks(o, lse, sinks)
        out = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, o, lse, sinks = ctx.saved_tensors
        call, tiles, scale = ctx.call, ctx.tiles, ctx.scale
        dq = torch.zeros_like(q, dtype=lse.dtype)

        # 1. Compute a block's gradients. dq stays here; dK and dV travel on with the block.
        def visit(source: int, block: Block) -> Tensor:
            d_kv = torch.zeros_like(block[0], dtype=lse.dtype)
            (k_, v_), (dk, dv) = columns(block[0], (k, v)), columns(d_kv, (k, v))
            attend_tiles_backward(tiles[source], (dq, dk, dv), do, q, k_, v_, o, lse, scale, ctx.backend)
            return d_kv

        # 2. Do so with every block that comes around; the gradients of the own block come home.
        block = (call.shard.pad(torch.cat([k, v], -1), 1),)
        dk, dv = columns(Ring(call, call.header("backward"), block).collect(block, visit)[:, : k.shape[1]], (k, v))
        d_sinks = sinks_backward(do, o, lse, sinks).to(sinks.dtype) if ctx.needs_input_grad[5] else None
        return None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks, None, None


def received(sizes: TokenSizes) -> tuple[int, int]:
    """Return (P-1) B T (k + v) numbers forward; backward as many again, and gradients that take P hops home."""
    numbers, ranks = sizes.rows * (sizes.keys + sizes.values), sizes.ranks
    forward = (ranks - 1) * numbers * sizes.element
    return forward, forward + (ranks * numbers * GRADIENT if ranks > 1 else 0)


STRATEGY = TokenStrategy("ring attention", received)
