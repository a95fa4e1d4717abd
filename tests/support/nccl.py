"""A stand-in for NCCL's messages, on the CPU: gloo carries them, if NCCL would.

NCCL knows no tags. The messages of two ranks, both ways, are one queue at each end, and the n-th operation of one end
meets the n-th of the other. A send that meets a send, or a receive a receive, never ends. The first operation with a
peer also stops the program until the peer comes to its own first.

A batch of messages is one operation on the group's communicator. All ranks take part in its first, and the n-th batch
of a rank meets the n-th of each peer. Tasks in the background are enqueued by whoever waits for them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hybrid_sp.comm import ledger, messages
from hybrid_sp.comm.pending import Header, Pending
from hybrid_sp.exchange import scan, star

BATCH = 1_000_000  # no rank, and more than the operations of a pair
PATIENCE = timedelta(seconds=20)  # until a peer comes to its first operation, and until what it does is known


@contextmanager
def messages_of_nccl() -> Iterator[None]:
    """Let messages meet as those of NCCL do; raises AssertionError where they would hang."""
    store, numbers = (
        dist.distributed_c10d._get_default_store(),
        defaultdict[tuple[str, int], Iterator[int]](itertools.count),
    )
    use = store.add(f"nccl, uses by rank {dist.get_rank()}", 1)  # each has names of its own

    def meet(group: dist.ProcessGroup, peer: int, kind: str) -> int:
        """The number of this operation with a peer, which is its tag; the ends of a number must be of two kinds."""
        number, me = next(numbers[group.group_name, peer]), dist.get_rank(group)
        pair = f"nccl {use} {group.group_name} {min(me, peer)}-{max(me, peer)} {number} "
        store.set(f"{pair}{me}", kind)
        theirs = f"{pair}{peer}"
        if number == 0:
            store.wait([theirs], PATIENCE)
        if store.check([theirs]):
            assert store.get(theirs).decode() != kind, (
                f"both ranks of the pair {kind} as operation {number}: a deadlock"
            )
        return number

    def isend(x: torch.Tensor, *, group: Any, group_dst: int, tag: int) -> Any:
        return plain_send(x, group=group, group_dst=group_dst, tag=meet(group, group_dst, "send"))

    def irecv(x: torch.Tensor, *, group: Any, group_src: int, tag: int) -> Any:
        return plain_receive(x, group=group, group_src=group_src, tag=meet(group, group_src, "receive"))

    def batch(operations: list[Any]) -> list[Any]:
        group = operations[0].group
        number, me = next(numbers[group.group_name, BATCH]), dist.get_rank(group)
        name = f"nccl {use} {group.group_name} batch {number} of rank "
        store.set(f"{name}{me}", " ".join(f"{one.kind}{one.group_peer}" for one in operations))
        if number == 0:
            store.wait([f"{name}{rank}" for rank in range(dist.get_world_size(group))], PATIENCE)
        for one in operations:
            if store.check([f"{name}{one.group_peer}"]):
                theirs = store.get(f"{name}{one.group_peer}").decode().split()
                wanted = f"{'receive' if one.kind == 'send' else 'send'}{me}"
                assert wanted in theirs, f"batch {number}: rank {one.group_peer} has {theirs}, not {wanted}: a deadlock"
        return [one.run(BATCH + number) for one in operations]

    def one_of_batch(operation: Any, x: torch.Tensor, *, group: Any, group_peer: int, tag: int) -> Any:
        if operation is isend:
            run = partial(plain_send, x, group=group, group_dst=group_peer)
        else:
            run = partial(plain_receive, x, group=group, group_src=group_peer)
        kind = "send" if operation is isend else "receive"
        return SimpleNamespace(group=group, group_peer=group_peer, kind=kind, run=lambda tag: run(tag=tag))

    def enqueue(task: Callable[[], Any], what: str, header: Header, device: Any = None) -> Pending:
        def run() -> Any:
            with torch.no_grad(), ledger.background_thread():
                return task()

        return Pending(run, what=what, header=header)

    plain_send, plain_receive = dist.isend, dist.irecv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "isend", isend)
        patch.setattr(dist, "irecv", irecv)
        patch.setattr(dist, "P2POp", one_of_batch)
        patch.setattr(dist, "batch_isend_irecv", batch)
        patch.setattr(messages, "in_one_order", lambda group: True)
        patch.setattr(scan, "run_in_background", enqueue)
        patch.setattr(star, "run_in_background", enqueue)
        yield
