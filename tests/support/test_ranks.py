"""run_ranks itself: results, warm processes, and what is said of a failure, a hang and a death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import ranks
from tests.support.impatience import MOMENT, timeout_of
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
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    return seen


def failing(group: dist.ProcessGroup) -> None:
    dist.barrier(group)  # all are in this function, and none of the others leaves it
    if dist.get_rank(group) == 1:
        raise ValueError("a wrong number of heads")
    dist.barrier(group)


def sleeping_rank(group: dist.ProcessGroup) -> None:
    dist.barrier(group)
    if dist.get_rank(group) == 1:
        signal.pause()
    assert timeout_of(group) == timedelta(seconds=360)
    dist.distributed_c10d._set_pg_timeout(MOMENT, group)
    dist.barrier(group)


def all_sleeping(group: dist.ProcessGroup, folder: Path) -> None:
    (folder / str(dist.get_rank(group))).touch()
    signal.pause()


def killed(group: dist.ProcessGroup, missed: bool) -> None:
    """`missed` by the others, whose collective fails."""
    dist.barrier(group)
    if dist.get_rank(group) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if missed:
        dist.barrier(group)
    signal.pause()


@pytest.fixture
def brief_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is said whether or not the other ranks are given time."""
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.1)


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
    threads = ranks.arithmetic["threads"]
    for _ in range(2):
        assert run_ranks(own_settings, 2) == [(threads, True, torch.float32)] * 2


def test_a_failure_names_its_rank_and_says_where_the_others_were(brief_grace: None) -> None:
    """The others were there: nobody has waited until they give up."""
    with pytest.raises(RankError, match="rank 1 of 3 failed first in failing: ValueError: a wrong number") as caught:
        run_ranks(failing, 3)
    message = str(caught.value)
    assert 'raise ValueError("a wrong number of heads")' in message
    assert message.count("was still at") == 2 and "in failing" in message.split("was still at")[1]


def test_a_waiting_rank_fails_before_the_deadline_and_the_late_one_is_shown(brief_grace: None) -> None:
    with pytest.raises(RankError, match="rank 0 of 2 failed first in sleeping_rank") as caught:
        run_ranks(sleeping_rank, 2, deadline=600.0)
    assert "in sleeping_rank" in str(caught.value).split("rank 1 was still at")[1]


def pass_at_once(seconds: float, monkeypatch: pytest.MonkeyPatch, event: Callable[[], bool] | None = None) -> None:
    """For run_ranks so many seconds pass when the event has come and all that was said before it has been heard; with
    no event before anything is heard."""
    ahead = 0.0

    def wait(pipes: list[Any], timeout: float) -> list[Any]:
        nonlocal ahead
        came = event is None or event()
        heard = [] if event is None and not ahead else waits(pipes, 0.01)
        ahead = seconds if came and not heard else ahead
        return heard

    waits = ranks.wait
    monkeypatch.setattr(ranks, "wait", wait)
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead))


def test_a_deadline_shows_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pass_at_once(1000.0, monkeypatch, lambda: len(list(tmp_path.iterdir())) == 2)
    with pytest.raises(RankError, match="all_sleeping on 2 ranks: not finished after 400 s") as caught:
        run_ranks(all_sleeping, 2, tmp_path, deadline=400.0)
    message = str(caught.value)
    for rank in range(2):
        assert "in all_sleeping" in message.split(f"rank {rank} was still at")[1]


def test_the_deadline_begins_when_every_rank_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long they took: here more than the deadline."""
    pass_at_once(ranks.START_SECONDS / 2, monkeypatch)
    assert len(run_ranks(own_settings, 2, deadline=ranks.START_SECONDS / 3)) == 2


def test_a_killed_rank_is_noticed_at_once_and_the_next_call_works(brief_grace: None) -> None:
    """Nobody waits for the deadline: the others were still there."""
    with pytest.raises(RankError, match="rank 2 of 3 failed first in killed: was killed by SIGKILL") as caught:
        run_ranks(killed, 3, missed=False, deadline=600.0)
    assert str(caught.value).count("was still at") == 2
    assert len(run_ranks(own_settings, 3)) == 3


def test_a_death_comes_first_although_it_is_noticed_last(brief_grace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(own_settings, 3)
    dying, waits = ranks._pool.workers[2].pipe, ranks.wait
    monkeypatch.setattr(ranks, "wait", lambda pipes, timeout: waits([p for p in pipes if p is not dying], timeout))
    with pytest.raises(RankError, match="rank 2 of 3 failed first in killed: was killed by SIGKILL"):
        run_ranks(killed, 3, missed=True)


def test_only_functions_that_ranks_can_import() -> None:
    with pytest.raises(ValueError, match="not at the top of its module"):
        run_ranks(lambda group: None, 2)
    with pytest.raises(ValueError, match="at least 1"):
        run_ranks(own_settings, 0)
