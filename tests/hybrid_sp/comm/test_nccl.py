"""Every exchange by messages, in the order that NCCL needs: a stand-in refuses what would hang there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hybrid_sp as hsp
from hybrid_sp.comm import groups, messages
from hybrid_sp.comm.pending import Header
from hybrid_sp.exchange import EXCHANGES, choose
from tests.hybrid_sp.cases import Case, truth
from tests.hybrid_sp.ops.test_parity import LAYOUTS, check_cases
from tests.support.nccl import messages_of_nccl
from tests.support.ranks import RankError, run_ranks

CASES = [
    *(
        Case(operator=kind, decay="scalar", states=True, linear=name)
        for kind in ("linear", "delta")
        for name in EXCHANGES
    ),
    Case(decay="scalar", linear="ring_attention"),
    Case(operator="softmax", softmax="ring"),
    Case(operator="softmax", groups=2, kv_heads_per_gather=1),
    Case(operator="conv", states=True),
]


def check(group: Any, cases: list[Any]) -> None:
    with messages_of_nccl():
        assert choose(hsp.SequenceParallel(group, linear="auto"), state_bytes=8).link is not None
        check_cases(group, cases, 8, 64)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_exchange_meets_in_order(world: int) -> None:
    cases = [replace(case, layout=layout) for case in CASES for layout in LAYOUTS]
    run_ranks(check, world, [(case, truth(case)) for case in cases], deadline=120)


def receive_first(group: Any) -> None:
    """Every rank receives from the rank before, and then sends to the next."""
    here, ranks, x = groups.rank(group), groups.size(group), torch.zeros(1)
    header = messages.open_exchange(Header(tag="test"), "shift", x, group)
    with messages_of_nccl():
        received = messages.start_receive(x, (here - 1) % ranks, 0, group, header)
        messages.start_send(x, (here + 1) % ranks, 0, group, header)
        received.wait()


def test_the_stand_in_refuses_what_hangs() -> None:
    run_ranks(messages_alone, 2)
    with pytest.raises(RankError, match="both ranks of the pair receive as operation 0: a deadlock"):
        run_ranks(receive_first, 2)


def messages_alone(group: Any) -> None:
    """The same by `start_shift`, whose order every network can carry."""
    x = torch.full((1,), float(groups.rank(group)))
    header = messages.open_exchange(Header(tag="test"), "shift", x, group)
    with messages_of_nccl():
        for number in range(3):
            x = messages.start_shift(x, number, group, header).wait()
    assert x == (groups.rank(group) - 3) % groups.size(group)


def uneven_batches(group: Any) -> None:
    """Both ranks send in their second batch, and neither receives."""
    x = torch.zeros(1)
    header = messages.open_exchange(Header(tag="test"), "shift", x, group)
    twin, me = messages.message_group(group), groups.rank(group)
    with messages_of_nccl():
        messages.start_shift(x, 0, group, header).wait()
        dist.batch_isend_irecv([dist.P2POp(dist.isend, x, group=twin, group_peer=1 - me, tag=0)])
        dist.barrier(group)
        dist.batch_isend_irecv([dist.P2POp(dist.isend, x, group=twin, group_peer=1 - me, tag=0)])


def test_the_stand_in_refuses_batches_that_do_not_meet() -> None:
    with pytest.raises(RankError, match="batch 1: rank . has .*, not receive.: a deadlock"):
        run_ranks(uneven_batches, 2)
