"""The operators that read a few tokens before their own, which other ranks may hold: short convolution and token shift.

    forward     send the last tokens | own tokens, as if zeros lay before every span | wait, add the halo's part
    backward    send the halo's gradient back | gradient of the own tokens | wait, add what came back

The schedule is in `_causal`, the arithmetic of a phase in `kernels/reference/conv.py`, and the exchange in
`exchange/halo.py`.
"""

from __future__ import annotations

import bisect
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import compute_dtype, default_shard, public_operator, require
from ..exchange.fetch import FetchPlan, before, last
from ..exchange.halo import Halo
from ..kernels.reference import conv as kernel
from ..kernels.reference.conv import Taps
from ..overlap import Call, finish, start
from ..shard import Shard


@public_operator
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    shard: Shard | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute a causal depthwise convolution over the sequence of which `shard` holds this rank's tokens.

        y_t = f(bias + sum over j < W of weight[:, W-1-j] * x_(t-j))

    A token before the begin of t's document counts as zero; before the first document lies the initial state.

    x           [B,T,D]; T are this rank's tokens
    weight      [D,W], W >= 1, its last column for the token itself (torch's conv1d with weight[:, None], groups=D and
                W-1 zeros on the left). Any float dtype
    bias        [D] or None, any float dtype
    activation  f: None is the identity, or "silu"
    shard       this rank's part of the sequence (`SequenceParallel.shard`), None for one device
    initial_state       [B,W-1,D] in the dtype of x, the W-1 tokens before the sequence, equal on all ranks. Each rank's
                        gradient is its contribution: their sum is the gradient
    return_final_state  also return the last W-1 tokens of the sequence [B,W-1,D], with zeros before the begin of the
                        last document, equal on all ranks; backward sums the gradients that the ranks give it

    Returns y [B,T,D] in the dtype of x, or (y, final_state). Sums are fp32 (fp64 for fp64) and rounded once.

    Communicates one all-to-all each way. Forward, each rank receives at most (W-1) B D numbers for each of its spans
    and as many for a final state, in the dtype of x. Backward, it receives a gradient for every use of its tokens on
    other ranks, in the dtype of sums. If W is 1, nothing is sent. Without a final state the same holds if every span
    begins with a document.

    Raises ValueError for shapes and dtypes that do not fit, before any communication.

    Source: the local convolution of Mamba (arXiv 2312.00752, section 3.4) and of DeltaNet (2406.06484, section 3.3).
    """
    shard = default_shard(shard, x)
    name = "short_conv"
    _check(name, x, shard)
    require(
        weight.ndim == 2 and weight.shape[0] == x.shape[2] and weight.shape[1] >= 1,
        name,
        f"weight must be [{x.shape[2]}, W] with W at least 1 for x {tuple(x.shape)}, got {tuple(weight.shape)}",
    )
    require(
        bias is None or bias.shape == x.shape[2:],
        name,
        f"bias must be [{x.shape[2]}], got {None if bias is None else tuple(bias.shape)}",
    )
    require(
        weight.is_floating_point() and (bias is None or bias.is_floating_point()),
        name,
        f"weight and bias must be floating point, got {weight.dtype} and {None if bias is None else bias.dtype}",
    )
    require(
        activation in (None, "silu"),
        name,
        f"activation must be None or 'silu', got {activation!r}",
    )
    _check_state(name, x, weight.shape[1], initial_state)
    dtype = compute_dtype(x)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    y, final = _causal(x, weight, bias, weight.shape[1], shard, initial_state, return_final_state)
    if activation == "silu":
        y = F.silu(y)
    y = y.to(x.dtype)
    return y if final is None else (y, final)


@public_operator
def token_shift(
    x: Tensor, *, shard: Shard | None = None, initial_state: Tensor | None = None, return_final_state: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the token before each token: y_t = x_(t-1), and zero for the first token of a document.

    x               [B,T,D]; T are this rank's tokens
    shard           this rank's part of the sequence, None for one device
    initial_state   [B,1,D] in the dtype of x, the token before the sequence; gradients as in `short_conv`
    return_final_state  also return the last token of the sequence [B,1,D], equal on all ranks

    Returns y [B,T,D] in the dtype of x, or (y, final_state). Each rank receives at most B D numbers for each of its
    spans, and as many for a final state. Raises ValueError for shapes and dtypes that do not fit, before any
    communication.

    Source: RWKV (arXiv 2305.13048, section 3.1.1).
    """
    shard = default_shard(shard, x)
    _check("token_shift", x, shard)
    _check_state("token_shift", x, 2, initial_state)
    y, final = _causal(x, None, None, 2, shard, initial_state, return_final_state)
    y = y.to(x.dtype)
    return y if final is None else (y, final)


def _causal(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    width: int,
    shard: Shard,
    initial: Tensor | None,
    final: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return y in the dtype of sums, and the final state in the dtype of x."""
    dtype = compute_dtype(x)
    plan = shard.once(_plan, width, final)
    exchange = Halo(plan, x, dtype)
    starts, reaches = _starts(shard)
    with Call(shard, "conv") as call:
        token = start(call, exchange, x, None)
        y = _Local.apply(call, exchange, token, x, weight, bias, starts)
        rows, _ = finish(call, exchange, token)
        states = _states(rows, plan, x, width - 1, initial)
        y = _AddHalo.apply(call, y, torch.stack(states[: len(reaches)]), weight, reaches)
    return y, states[-1].to(x.dtype) if final else None


def _plan(shard: Shard, width: int, final: bool) -> FetchPlan:
    """Plan the fetch of the tokens before every span, and for a final state of the sequence's last tokens."""
    ends = [last(shard, width - 1)] if final else []
    return FetchPlan(shard, [before(shard, rank, width - 1) + ends for rank in range(shard.sp.size)])


def _states(rows: Tensor, plan: FetchPlan, x: Tensor, width: int, initial: Tensor | None) -> list[Tensor]:
    """Return the `width` tokens before the end of every range [B,width,D].

    A range may be shorter. Zeros lie before its rows, or the initial state if the range starts with the sequence.
    """
    states = []
    lengths = [end - first for first, end in plan.ranges]
    for (first, end), part in zip(plan.ranges, rows.split(lengths, 1), strict=True):
        missing = width - (end - first)
        past = rows.new_zeros(x.shape[0], missing, x.shape[2])
        if initial is not None:  # always in the graph, so that every rank has a gradient, even a zero one
            known = missing if first == 0 else 0
            past = torch.cat([past[:, known:], initial[:, width - known :].to(rows.dtype)], 1)
        states.append(torch.cat([past, part], 1))
    return states


def _starts(shard: Shard) -> tuple[list[int], list[tuple[int, int]]]:
    """Return two lists of local tokens for the halo.

    First, the tokens, except 0, at which a span or a document starts. Second, for each span the half-open range that
    its halo can reach: from the span's first token to the end of the document that continues into the span.
    """
    offsets = [0, *itertools.accumulate(shard.span_lengths)]
    ends = [*shard.local_boundaries, shard.tokens]
    reaches = [(a, min(b, ends[bisect.bisect_left(ends, a)])) for a, b in itertools.pairwise(offsets)]
    return sorted({*offsets[:-1], *ends[:-1]} - {0}), reaches


class _Local(torch.autograd.Function):
    """The node of the own tokens. Its dx goes to the exchange, which adds the gradients from other ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        exchange: Halo,
        token: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        starts: list[int],
    ) -> Tensor:
        ctx.call, ctx.exchange, ctx.starts = call, exchange, starts
        ctx.save_for_backward(x, weight)
        with call.phase("own", "forward", x):
            return kernel.local_forward(x, Taps(weight, starts, x), bias, exchange.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        want_x, _, want_weight, want_bias = ctx.needs_input_grad[2:6]
        with ctx.call.phase("own", "backward", x):
            taps = Taps(weight, ctx.starts, x)
            ctx.exchange.own, d_weight = kernel.local_backward(dy, x, taps, want_x, want_weight)
            d_bias = dy.sum((0, 1)) if want_bias else None
        return None, None, dy.new_empty(0) if want_x else None, None, d_weight, d_bias, None


class _AddHalo(torch.autograd.Function):
    """Add the contribution of the tokens before each span to y, in place."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, y: Tensor, halo: Tensor, weight: Tensor | None, reaches: list[tuple[int, int]]
    ) -> Tensor:
        ctx.call, ctx.reaches = call, reaches
        ctx.save_for_backward(halo, weight)
        ctx.mark_dirty(y)
        with call.phase("halo", "forward", y):
            return kernel.halo_forward(y, halo, Taps(weight, [], y), reaches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        halo, weight = ctx.saved_tensors
        with ctx.call.phase("halo", "backward", dy):
            d_halo, d_weight = kernel.halo_backward(dy, halo, Taps(weight, [], dy), ctx.reaches)
        return None, dy, d_halo, None if weight is None else d_weight, None


def _check(name: str, x: Tensor, shard: Shard) -> None:
    require(x.ndim == 3, name, f"x must be [batch, tokens, dim], got {tuple(x.shape)}")
    require(x.is_floating_point(), name, f"x must be floating point, got {x.dtype}")
    shard.require_tokens(name, x=x.shape[1])
    shard.require_batch(name, x)


def _check_state(name: str, x: Tensor, width: int, state: Tensor | None) -> None:
    if state is not None:
        shape = (x.shape[0], width - 1, x.shape[2])
        require(
            tuple(state.shape) == shape and state.dtype == x.dtype,
            name,
            f"initial_state must be {shape} of {x.dtype}, got {tuple(state.shape)} of {state.dtype}",
        )
