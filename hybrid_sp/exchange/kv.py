"""How ranks learn the keys and values that their queries see on other ranks: all of them, or the ranges they need.

`Whole` is AllGather-KV: an all-gather forward, a reduce-scatter of the gradients backward. `Ranges` is for queries that
see little, of a window or of packed documents: an all-to-all each way, of a size that does not depend on the sequence.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..comm import collectives
from ..comm.pending import Header, Pending
from ..shard import Shard
from .halo import Plan, Range


class Keys(Protocol):
    """One call of softmax attention: k, v [B,T,G,D] of this rank go out, those that it reads come in [2,B,S,G,D]."""

    def launch(self, header: Header, k: Tensor, v: Tensor) -> Pending:
        """The result is what this rank reads of K and V."""

    def places(self, ranges: list[Range]) -> list[int]:
        """Where each of this rank's ranges begins in it."""

    def launch_backward(self, header: Header, d_kv: Tensor) -> Pending:
        """From its gradient; the result is for `add`."""

    def add(self, dk: Tensor, dv: Tensor, received: Tensor) -> None:
        """Add what the other ranks' queries give to dk and dv [B,T,G,D] of this rank, in place."""


class Whole:
    """K and V of the whole sequence."""

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


class Ranges:
    """K and V of the ranges that a plan asks for, one after the other."""

    def __init__(self, plan: Plan) -> None:
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
