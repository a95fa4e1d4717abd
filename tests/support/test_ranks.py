"""run_ranks itself: results, warm processes, and what is said of a failure, a hang and a death."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, run_ranks


@dataclass
class Parcel:
    x: torch.Tensor


def summed(group: dist.ProcessGroup, parcel: Parcel, factor: float) -> tuple[int, Parcel]:
    x = parcel.x * (factor * dist.get_rank(group))
    dist.all_reduce(x, group=group)
    return os.getpid(), Parcel(x)


def own_settings(group: dist.ProcessGroup) -> tuple[int, bool, torch.dtype]:
    seen = torch.get_num_threads(), bool(torch.empty(4).isnan().all()), torch.get_default_dtype()
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    return seen


def failing(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        raise ValueError("a wrong number of heads")
    dist.barrier(group)


def sleeping_rank(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        time.sleep(60)
    dist.barrier(group)


def all_sleeping(group: dist.ProcessGroup) -> None:
    time.sleep(60)


def killed(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier(group)


def test_results_come_back_in_order_and_processes_are_reused() -> None:
    parcel = Parcel(torch.arange(3.0, dtype=torch.float64, requires_grad=True))
    first = run_ranks(summed, 4, parcel, factor=0.5)
    for _, got in first:
        assert torch.equal(got.x, 3 * parcel.x)
    pids = [pid for pid, _ in first]
    assert len(set(pids)) == 4 and os.getpid() not in pids
    assert [pid for pid, _ in run_ranks(summed, 2, parcel, factor=1.0)] == pids[:2]
    assert [pid for pid, _ in run_ranks(summed, 1, parcel, factor=1.0)] == pids[:1]


def test_a_call_leaves_no_settings_to_the_next() -> None:
    for _ in range(2):
        assert run_ranks(own_settings, 2) == [(1, True, torch.float32)] * 2


def test_a_failure_names_its_rank_and_says_where_the_others_were() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 3 failed first in failing: ValueError: a wrong number") as caught:
        run_ranks(failing, 3)
    message = str(caught.value)
    assert 'raise ValueError("a wrong number of heads")' in message
    assert message.count("was still at") == 2 and "in failing" in message.split("was still at")[1]
    assert time.monotonic() - start < 30


def test_a_waiting_rank_fails_before_the_deadline_and_the_late_one_is_shown() -> None:
    with pytest.raises(RankError, match="rank 0 of 2 failed first in sleeping_rank") as caught:
        run_ranks(sleeping_rank, 2, deadline=8.0)
    assert "in sleeping_rank" in str(caught.value).split("rank 1 was still at")[1]


def test_a_deadline_shows_every_rank() -> None:
    with pytest.raises(RankError, match="all_sleeping on 2 ranks: not finished after 3 s") as caught:
        run_ranks(all_sleeping, 2, deadline=3.0)
    message = str(caught.value)
    for rank in range(2):
        assert "in all_sleeping" in message.split(f"rank {rank} was still at")[1]


def test_a_killed_rank_is_noticed_at_once_and_the_next_call_works() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 2 of 3 failed first in killed: was killed by SIGKILL"):
        run_ranks(killed, 3)
    assert time.monotonic() - start < 30
    assert len(run_ranks(own_settings, 3)) == 3


def test_only_functions_that_ranks_can_import() -> None:
    with pytest.raises(ValueError, match="not at the top of its module"):
        run_ranks(lambda group: None, 2)
    with pytest.raises(ValueError, match="at least 1"):
        run_ranks(own_settings, 0)
