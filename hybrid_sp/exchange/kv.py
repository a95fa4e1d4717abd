"""The exchanges of keys and values that queries see on other ranks: all of them, or the ranges that they need.

`AllGatherKV` is an all-gather forward, and a reduce-scatter of the gradients backward. `FetchKV` is for queries that
see little: those with a window, or in packed documents. It is an all-to-all each way, and its size does not depend on
the length.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..comm import collectives
from ..comm.pending import Header, Pending
from ..shard import Shard
from .fetch import FetchPlan, Range
from .strategy import GRADIENT, TokenSizes, TokenStrategy


class KVExchange(Protocol):
    """The exchange of one call of softmax attention: k, v [B,T,G,D] of this rank go out, [2,B,S,G,D] come in."""

    def launch(self, header: Header, k: Tensor, v: Tensor) -> Pending:
        """Launch; the result holds the K and V that this rank reads."""

    def places(self, ranges: list[Range]) -> list[int]:
        """Return the place in the result at which each of this rank's ranges begins."""

    def launch_backward(self, header: Header, d_kv: Tensor) -> Pending:
        """Launch the way back of the result's gradient; its own result is for `add`."""

    def add(self, dk: Tensor, dv: Tensor, received: Tensor) -> None:
        """Add the gradients from other ranks' queries to dk and dv [B,T,G,D] of this rank, in place."""


class AllGatherKV:
    """The exchange of K and V of the whole sequence (arXiv 2407.21783, section 3.3.2; 2502.07563, algorithm 7)."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def launch(self, header: Header, k: Tensor, v: Tensor) -> Pending:
        sent = self.shard.pad(torch.stack([k, v]), 2)
        gather = collectives.start_all_gather(sent, self.shard.sp.group, header)
        return gather.then(lambda kv_P: self.shard.join(kv_P, 2))

    def places(self, ranges: list[Range]) -> list[int]:
        return [first for first, _ in ranges]

    def launch_backward(self, header: Header, d_kv: Tensor) -> Pending:
        return collectives.start_reduce_scatter(self.shard.split(d_kv, 2), self.shard.sp.group, header)

    def add(self, dk: Tensor, dv: Tensor, received: Tensor) -> None:
        for grad, others in zip((dk, dv), received, strict=True):
            grad += others[:, : grad.shape[1]]


class FetchKV:
    """The exchange of K and V of the ranges that a plan asks for, one after the other."""

    def __init__(self, plan: FetchPlan) -> None:
        self.plan = plan

    def launch(self, header: Header, k: Tensor, v: Tensor) -> Pending:
        picked = torch.stack([self.plan.pick(k), self.plan.pick(v)], 1)
        return self.plan.fetch(header, picked).then(lambda rows: rows.permute(1, 2, 0, 3, 4))

    def places(self, ranges: list[Range]) -> list[int]:
        lengths = [end - first for first, end in ranges]
        return [sum(lengths[:i]) for i in range(len(lengths))]

    def launch_backward(self, header: Header, d_kv: Tensor) -> Pending:
        return self.plan.give_back(header, d_kv.permute(2, 0, 1, 3, 4))

    def add(self, dk: Tensor, dv: Tensor, received: Tensor) -> None:
        self.plan.add(dk, received[:, 0])
        self.plan.add(dv, received[:, 1])


def received(sizes: TokenSizes) -> tuple[int, int]:
    """Return (P-1) B T (k + v) numbers forward, as many of gradients backward; without keep_kv the forward's again."""
    numbers = (sizes.ranks - 1) * sizes.rows * (sizes.keys + sizes.values)
    forward = numbers * sizes.element
    return forward, numbers * GRADIENT + (0 if sizes.keep_kv else forward)


STRATEGY = TokenStrategy("AllGather-KV", received)
