"""The exchanges of keys and values that queries see on other ranks: all of them, or the ranges that they need.

`AllGatherKV` is an all-gather forward, and a reduce-scatter of the gradients backward. `FetchKV` is for queries that
see little: those with a window, or in packed documents. It is an all-to-all each way, and its size does not depend on
the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..comm import collectives
from ..comm.pending import Header, Pending
from ..shard import Shard
from .fetch import FetchPlan, Range
from .strategy import GRADIENT, TokenSizes, TokenStrategy


class KVExchange(Protocol):
    """The exchange of one call of attention: rows x [B,T,G,...] of this rank go out, [B,S,G,...] come in.

    A row is what a query needs of a token: its key and its value, or the latent from which both are made.
    """

    def launch(self, header: Header, x: Tensor) -> Pending:
        """Launch; the result holds the rows that this rank reads."""

    def places(self, ranges: list[Range]) -> list[int]:
        """Return the place in the result at which each of this rank's ranges begins."""

    def launch_backward(self, header: Header, dx: Tensor) -> Pending:
        """Launch the way back of the result's gradient; its own result is for `add`."""

    def add(self, grads: Sequence[Tensor], received: Tensor) -> None:
        """Add the gradients from other ranks' queries to those of this rank's rows, in place.

        The columns of rows are divided among the tensors of `grads`.
        """


class AllGatherKV:
    """The exchange of the rows of the whole sequence (arXiv 2407.21783, section 3.3.2; 2502.07563, algorithm 7)."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def launch(self, header: Header, x: Tensor) -> Pending:
        gather = collectives.start_all_gather(self.shard.pad(x, 1), self.shard.sp.group, header)
        return gather.then(lambda x_P: self.shard.join(x_P, 1))

    def places(self, ranges: list[Range]) -> list[int]:
        return [first for first, _ in ranges]

    def launch_backward(self, header: Header, dx: Tensor) -> Pending:
        return collectives.start_reduce_scatter(self.shard.split(dx, 1), self.shard.sp.group, header)

    def add(self, grads: Sequence[Tensor], received: Tensor) -> None:
        for grad, others in zip(grads, columns(received, grads), strict=True):
            grad += others[:, : grad.shape[1]]


class FetchKV:
    """The exchange of the rows of the ranges that a plan asks for, one after the other."""

    def __init__(self, plan: FetchPlan) -> None:
        self.plan = plan

    def launch(self, header: Header, x: Tensor) -> Pending:
        return self.plan.fetch(header, self.plan.pick(x)).then(lambda rows: rows.transpose(0, 1))

    def places(self, ranges: list[Range]) -> list[int]:
        lengths = [end - first for first, end in ranges]
        return [sum(lengths[:i]) for i in range(len(lengths))]

    def launch_backward(self, header: Header, dx: Tensor) -> Pending:
        return self.plan.give_back(header, dx.transpose(0, 1))

    def add(self, grads: Sequence[Tensor], received: Tensor) -> None:
        for grad, others in zip(grads, columns(received, grads), strict=True):
            self.plan.add(grad, others)


def columns(x: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cut the last dim of x into parts as wide as those tensors."""
    return x.split([part.shape[-1] for part in like], -1)


def received(sizes: TokenSizes) -> tuple[int, int]:
    """Return (P-1) B T (k + v) numbers forward, as many of gradients backward; without keep_kv the forward's again."""
    numbers = (sizes.ranks - 1) * sizes.rows * (sizes.keys + sizes.values)
    forward = numbers * sizes.element
    return forward, numbers * GRADIENT + (0 if sizes.keep_kv else forward)


STRATEGY = TokenStrategy("AllGather-KV", received)
