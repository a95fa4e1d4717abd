"""The operators that cut heads instead of tokens: DeepSpeed-Ulysses (arXiv 2309.14509), and Megatron-SP's volumes.

    tokens of this rank, all heads -> all tokens, heads of this rank -> the operator on one device -> and back

These are baselines. The bytes that a rank receives grow with its tokens, and there can be at most one rank per key
head. Nothing is computed while the tensors travel. In backward each reshard is its mirror image, since the adjoint of
one direction is the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import require
from ..comm import collectives
from ..comm.pending import Header, Pending
from ..exchange.strategy import GRADIENT, TokenSizes, TokenStrategy
from ..overlap import Call
from ..shard import SequenceParallel, Shard

Way = Callable[[Header, Tensor], Pending]  # of one tensor, between all heads and all tokens


class Reshard(Protocol):
    """The contract of a reshard between x [B,T,H,...], all heads of this rank's tokens, and y [B,L,h,...].

    y has all tokens of this rank's h = H/P heads.
    """

    def to_heads(self, header: Header, x: Tensor) -> Pending:
        """Launch the way from x to y."""

    def to_tokens(self, header: Header, y: Tensor) -> Pending:
        """Launch the way from y to x."""


@dataclass(frozen=True)
class Ulysses:
    """The all-to-all: every rank gets the heads that it works on, (P-1) B T H/P numbers a tensor."""

    shard: Shard

    def to_heads(self, header: Header, x: Tensor) -> Pending:
        sent = rearrange(self.shard.pad(x, 1), "B T (P h) ... -> P B T h ...", P=self.shard.sp.size)
        return self._exchange(header, sent).then(lambda received: self.shard.join(received, 1))

    def to_tokens(self, header: Header, y: Tensor) -> Pending:
        return self._exchange(header, self.shard.split(y, 1)).then(
            lambda received: rearrange(received[:, :, : self.shard.tokens], "P B T h ... -> B T (P h) ...")
        )

    def _exchange(self, header: Header, x_P: Tensor) -> Pending:
        one_each = [1] * self.shard.sp.size
        return collectives.start_all_to_all(x_P, one_each, one_each, self.shard.sp.group, header)


@dataclass(frozen=True)
class Megatron:
    """The volumes of Megatron-SP inside the operator, (P-1) B T H numbers a tensor.

    One way is an all-gather of all heads, and each rank keeps its own. The other is a reduce-scatter of all heads, and
    each rank fills in its own. Megatron-SP itself gathers the layer's input and scatters the sum of its projected
    output (arXiv 2205.05198).
    """

    shard: Shard

    def to_heads(self, header: Header, x: Tensor) -> Pending:
        heads = _own_heads(self.shard, x.shape[2])
        gather = collectives.start_all_gather(self.shard.pad(x, 1), self.shard.sp.group, header)
        return gather.then(lambda x_P: self.shard.join(x_P[:, :, :, heads], 1))

    def to_tokens(self, header: Header, y: Tensor) -> Pending:
        parts = self.shard.split(y, 1)
        heads = parts.shape[3] * self.shard.sp.size
        whole = parts.new_zeros(*parts.shape[:3], heads, *parts.shape[4:])
        whole[:, :, :, _own_heads(self.shard, heads)] = parts
        scatter = collectives.start_reduce_scatter(whole, self.shard.sp.group, header)
        return scatter.then(lambda x: x[:, : self.shard.tokens])


@dataclass(frozen=True)
class GatherStates:
    """Gather the final states of all heads [B,H,...], equal on all ranks, from each rank's heads [B,h,...].

    The way back sums over ranks.
    """

    shard: Shard

    def to_heads(self, header: Header, x: Tensor) -> Pending:
        x_P = rearrange(x, "B (P h) ... -> P B h ...", P=self.shard.sp.size)
        return collectives.start_reduce_scatter(x_P, self.shard.sp.group, header)

    def to_tokens(self, header: Header, y: Tensor) -> Pending:
        gather = collectives.start_all_gather(y, self.shard.sp.group, header)
        return gather.then(lambda y_P: rearrange(y_P, "P B h ... -> B (P h) ..."))


HEAD_PARALLEL: dict[str, Callable[[Shard], Reshard]] = {"ulysses": Ulysses, "megatron": Megatron}


def run_head_parallel(
    name: str,
    operator: Callable[..., Any],
    shard: Shard,
    tag: str,
    tokens: dict[str, Tensor | None],
    states: Tensor | tuple[Tensor, ...] | None = None,
    parameters: dict[str, Tensor | None] | None = None,
) -> Any:
    """Run `operator` over the sequence of `shard`: with this rank's heads, on one device.

    name        of the operator; `tag` is its kind of layer
    tokens      its arguments that are cut over ranks, [B,T,heads,...]
    states      its initial_state, on every rank, [B,heads,...] or a pair of them
    parameters  its arguments that every rank has, [heads,...]

    Returns o [B,T,H,...], or (o, final_state) of all heads, as the operator does. For arguments that every rank has, a
    rank's gradient is its contribution, zero for the heads of others. Raises ValueError unless the ranks divide the
    heads.
    """
    ranks, form = shard.sp.size, getattr(shard.sp, tag)
    given = {key: x for key, x in tokens.items() if x is not None}
    for key, x in given.items():
        message = f'{tag}="{form}" cuts heads: {ranks} ranks must divide the {x.shape[2]} heads of {key}; take fewer'
        require(x.shape[2] % ranks == 0, name, f"{message} ranks, or a strategy that cuts tokens")
    # 1. Exchange all heads of this rank's tokens for all tokens of this rank's heads.
    call, reshard = Call(shard, tag), HEAD_PARALLEL[form](shard)
    there, back = [reshard.to_heads] * len(given), [reshard.to_tokens] * len(given)
    here = dict(zip(given, _Exchanged.apply(call, there, back, *given.values()), strict=True))
    here |= {key: x if x is None else x[_own_heads(shard, len(x))] for key, x in (parameters or {}).items()}
    if states is not None:
        pair = states if isinstance(states, tuple) else (states,)
        own = tuple(x[:, _own_heads(shard, x.shape[1])] for x in pair)
        here["initial_state"] = own if isinstance(states, tuple) else own[0]
    # 2. Run the operator on one device.
    out = operator(**here, shard=shard.once(_alone))
    o, final = (out, ()) if isinstance(out, Tensor) else out
    finals = (final,) if isinstance(final, Tensor) else final
    # 3. Exchange back, and gather the final states of all heads.
    reshards = [reshard, *(GatherStates(shard) for _ in finals)]
    o, *whole = _Exchanged.apply(
        call, [one.to_tokens for one in reshards], [one.to_heads for one in reshards], o, *finals
    )
    if isinstance(out, Tensor):
        return o
    return o, whole[0] if isinstance(final, Tensor) else tuple(whole)


def _own_heads(shard: Shard, heads: int) -> slice:
    """Return the slice of this rank's heads."""
    own = heads // shard.sp.size
    return slice(shard.sp.rank * own, (shard.sp.rank + 1) * own)


def _alone(shard: Shard) -> Shard:
    """Return the whole sequence on one device; its calls are numbered among those of the shard."""
    return Shard(SequenceParallel(None), shard.length, shard.cu_seqlens, shard.calls)


class _Exchanged(torch.autograd.Function):
    """The node of one exchange: each tensor goes its way `there`, and its gradient the way `back`."""

    @staticmethod
    def forward(ctx: Any, call: Call, there: list[Way], back: list[Way], *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.back = call, back
        return _all(there, call.header("forward", "grad" if any(ctx.needs_input_grad) else "no grad"), xs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        return None, None, None, *_all(ctx.back, ctx.call.header("backward"), dys)


def _all(ways: list[Way], header: Header, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Launch all before waiting for the first."""
    started = [way(header, x) for way, x in zip(ways, xs, strict=True)]
    return tuple(pending.wait() for pending in started)


def _received(sizes: TokenSizes, shares: int) -> tuple[int, int]:
    """Return (P-1)/P B T times all numbers of q, k, v, o and gates times `shares`, each way."""
    if sizes.heads % sizes.ranks or sizes.groups % sizes.ranks:
        heads = f"{sizes.heads} and {sizes.groups} key-value heads"
        raise ValueError(f"Ulysses cuts heads: {sizes.ranks} ranks must divide {heads}; take fewer")
    numbers = sizes.queries + sizes.keys + sizes.values + sizes.outputs
    row = numbers * sizes.element + sizes.gates * GRADIENT
    way = (sizes.ranks - 1) * sizes.rows * row // sizes.ranks * shares
    return way, way


ULYSSES = TokenStrategy("all-to-all of heads, Ulysses", lambda sizes: _received(sizes, 1))
MEGATRON = TokenStrategy("gathers of all heads, Megatron-SP", lambda sizes: _received(sizes, sizes.ranks))
