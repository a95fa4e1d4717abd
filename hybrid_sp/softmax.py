"""Softmax attention whose sequence is cut over ranks: AllGather-KV (Llama 3, arXiv 2407.21783; LASP-2H, 2502.07563).

    forward     launch the gather of K, V | own blocks | wait | all other keys, merged by log-sum-exp
    backward    other keys' dK, dV -> launch their reduce-scatter | own blocks | wait, add the own dK, dV

Three autograd nodes share one `Call`. Backward needs the merged output and its lse in both attention nodes, so `_Rest`
keeps them and hands them to `_Own` within the pass, with its dq; `_Own` hands its dk, dv to `_Gather`. Sums are fp32
and rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import collectives
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

        o_t = sum over s of softmax_s(scale * q_t . k_s) v_s          s <= t where causal

    q       [B,T,Hq,D]
    k, v    [B,T,Hkv,D], Hq a multiple of Hkv; query head h reads key head h // (Hq // Hkv). K and V are gathered before
            heads are repeated
    scale   None is D**-0.5
    shard   this rank's part of the sequence, None for one device, where with causal=False k and v may have a length of
            their own

    Returns o [B,T,Hq,D] in the dtype of q. Each rank receives 2 (P-1) B T Hkv D numbers forward (dtype of k) and as
    many backward (fp32, or fp64). Raises ValueError for shapes and dtypes that do not fit, before any communication.

    Source: AllGather-KV, arXiv 2407.21783, section 3.3.2; arXiv 2502.07563, algorithm 7.
    """
    if window is not None:
        raise NotImplementedError("softmax_attention(window=...) is not built yet")
    shard, keys = shard_of(shard, q), shard_of(shard, q if causal else k)
    _check(q, k, v, shard, keys, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocks = _blocks(shard, causal, keys.tokens)
    with Call(shard, "softmax") as call:
        carry = _Carry(call)
        token = _Gather.apply(carry, keys, k, v)
        o, lse = _Own.apply(carry, token, q, k, v, blocks, scale)
        return _Rest.apply(carry, keys, token, q, o, lse, blocks, scale)


class _Block(NamedTuple):
    """Local queries [first, last) see the local keys [keys, keys_end), and of the whole sequence the ranges `rest`."""

    first: int
    last: int
    keys: int
    keys_end: int
    causal: bool
    rest: list[tuple[int, int]]


def _blocks(shard: Shard, causal: bool, keys: int) -> list[_Block]:
    if not causal:
        edges = [0, *(edge for span in shard.spans for edge in span), shard.length]
        rest = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        return [_Block(0, shard.tokens, 0, keys, False, rest)]
    blocks, offset = [], 0
    for start, end in shard.spans:
        last = offset + end - start
        blocks.append(_Block(offset, last, offset, last, True, [(0, start)] if start else []))
        offset = last
    return blocks


class _Carry:
    """What one backward pass hands from node to node: `_Rest` to `_Own` to `_Gather`."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.whole: tuple[Tensor, Tensor, Tensor] | None = None  # merged o and lse, dq of the rest
        self.own: tuple[Tensor, Tensor] | None = None  # dk, dv of the own blocks

    def take_whole(self) -> tuple[Tensor, Tensor, Tensor]:
        whole, self.whole = self.whole, None
        assert whole is not None, "backward of the own blocks before that of the rest"
        return whole

    def take_own(self) -> tuple[Tensor, Tensor]:
        own, self.own = self.own, None
        assert own is not None, "backward of the gather before that of the own blocks"
        return own


class _Gather(torch.autograd.Function):
    """Forward launches the gather of K and V; backward waits for the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, carry: _Carry, shard: Shard, k: Tensor, v: Tensor) -> Tensor:
        ctx.carry, ctx.shard, ctx.dtype = carry, shard, k.dtype
        note = "grad" if any(ctx.needs_input_grad) else "no grad"

        def launch() -> collectives.Pending:
            sent = shard.pad(torch.stack([k, v]), 2)
            return collectives.start_all_gather(sent, shard.sp.group, carry.call.header("forward", note))

        carry.call.launch_forward(launch)
        return k.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor) -> tuple[None, None, Tensor, Tensor]:
        gathered = ctx.carry.call.backward_result()
        dk, dv = ctx.carry.take_own()
        dk, dv = (a + b for a, b in zip((dk, dv), gathered.narrow(2, 0, dk.shape[1]), strict=True))
        return None, None, dk.to(ctx.dtype), dv.to(ctx.dtype)


class _Own(torch.autograd.Function):
    """Attention of each block of local queries to its local keys, while the gather is in flight."""

    @staticmethod
    def forward(
        ctx: Any, carry: _Carry, token: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: list[_Block], scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.carry, ctx.blocks, ctx.scale = carry, blocks, scale
        ctx.save_for_backward(q, k, v)
        parts = [attend(q[:, b.first : b.last], *_local(b, k, v), b.causal, scale) for b in blocks]
        o, lse = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: None) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        o, lse, dq = ctx.carry.take_whole()
        dk, dv = (torch.zeros_like(x, dtype=dq.dtype) for x in (k, v))
        for b in ctx.blocks:
            rows = slice(b.first, b.last)
            block = (do[:, rows], q[:, rows], *_local(b, k, v), o[:, rows], lse[:, rows])
            grads = attend_backward(*block, b.causal, ctx.scale)
            dq[:, rows] += grads[0]
            dk[:, b.keys : b.keys_end] += grads[1]
            dv[:, b.keys : b.keys_end] += grads[2]
        ctx.carry.own = (dk, dv)
        d_token = dq.new_empty(0)  # orders this node before the gather's; dk and dv go there with the others' share
        return None, d_token, dq.to(q.dtype), None, None, None, None


class _Rest(torch.autograd.Function):
    """Waits for all keys, attends to those that are not local, and merges."""

    @staticmethod
    def forward(
        ctx: Any,
        carry: _Carry,
        shard: Shard,
        token: Tensor,
        q: Tensor,
        o: Tensor,
        lse: Tensor,
        blocks: list[_Block],
        scale: float,
    ) -> Tensor:
        ctx.carry, ctx.shard, ctx.blocks, ctx.scale = carry, shard, blocks, scale
        (kv,) = recorded(lambda: (shard.join(carry.call.forward_result(), 2),))
        merged, merged_lse = o.to(lse.dtype, copy=True), lse.clone()
        for b in blocks:
            if b.rest:
                rows = slice(b.first, b.last)
                o_rest, lse_rest = attend(q[:, rows], *_ranges(kv, b), False, scale)
                merged[:, rows], merged_lse[:, rows] = merge(merged[:, rows], lse[:, rows], o_rest, lse_rest)
        out = merged.to(q.dtype)
        ctx.save_for_backward(q, kv, out, merged_lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, kv, o, lse = ctx.saved_tensors
        dtype = compute_dtype(q)
        dq, dkv = torch.zeros_like(q, dtype=dtype), torch.zeros_like(kv, dtype=dtype)
        for b in ctx.blocks:
            if b.rest:
                rows = slice(b.first, b.last)
                block = (do[:, rows], q[:, rows], *_ranges(kv, b), o[:, rows], lse[:, rows])
                grads = attend_backward(*block, False, ctx.scale)
                dq[:, rows] += grads[0]
                lengths = [end - start for start, end in b.rest]
                for side, grad in zip(dkv, grads[1:], strict=True):
                    for (start, end), piece in zip(b.rest, grad.split(lengths, 1), strict=True):
                        side[:, start:end] += piece
        ctx.carry.whole = (o, lse, dq)
        d_token = None
        if ctx.needs_input_grad[2]:
            shard, call = ctx.shard, ctx.carry.call
            header = call.header("backward")
            call.launch_backward(lambda: collectives.start_reduce_scatter(shard.split(dkv, 2), shard.sp.group, header))
            d_token = dq.new_empty(0)
        return None, None, d_token, None, do, None, None, None


def _local(b: _Block, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k[:, b.keys : b.keys_end], v[:, b.keys : b.keys_end]


def _ranges(kv: Tensor, b: _Block) -> tuple[Tensor, Tensor]:
    """K and V of the ranges that the block sees beside its own keys, from both [2,B,L,G,D]."""
    pieces = [kv[:, :, start:end] for start, end in b.rest]
    seen = torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]
    return seen[0], seen[1]


def _check(q: Tensor, k: Tensor, v: Tensor, shard: Shard, keys: Shard, backend: str) -> None:
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
    shard.require_tokens(name, q=q.shape[1])
    keys.require_tokens(name, k=k.shape[1])
