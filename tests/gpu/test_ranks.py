"""The checks on several ranks, on a CPU: those that need no CUDA run, and the others say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.first import plan
from hybrid_sp.comm import groups
from tests.gpu import ending, ranks
from tests.gpu.ending import Ended, Trouble
from tests.gpu.ranks import Kernel, Place
from tests.support.ranks import RankError, run_ranks
from tests.support.tiers import tiered

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run_checks(group: Any, names: list[str]) -> dict[str, str]:
    """What each check says on this rank."""
    said = {}
    for name in names:
        try:
            said[name] = ranks.CHECKS[name](Place(group, CPU, few=True))
        except ranks.Lacking as lack:
            said[name] = str(lack)
    return said


@pytest.mark.parametrize(("world", "names"), tiered([(2, ["start", "parity", "auto", "train"])], [(3, ["order"])]))
def test_checks_pass_on_a_cpu(world: int, names: list[str]) -> None:
    for said in run_ranks(run_checks, world, names):
        assert not [words for words in said.values() if words.startswith("needs")], said


def test_what_needs_cuda_or_more_ranks_says_so() -> None:
    names = ["order", "stress", "syncs", "hidden", "overlap"]
    for said in run_ranks(run_checks, 2, names):
        assert said["order"] == "needs 3 or 4 ranks, got 2" and said["overlap"].startswith("equal bits")
        assert {said[name] for name in ("stress", "syncs", "hidden")} == {"needs CUDA"}
    assert {*ranks.CHECKS, "loss"} == plan.CHECKS.keys()


def breaks(group: Any, name: str) -> None:
    """A rank whose results are off, by what the check must see."""
    if groups.rank(group) == 1:
        if name == "parity":
            right = ranks.measured
            ranks.measured = lambda *x, **y: {key: value * (1 + 1e-9) for key, value in right(*x, **y).items()}
        else:
            run = ranks.Layers.run
            ranks.Layers.run = lambda self: [x + 0.1 * torch.rand_like(x) for x in run(self)]
    ranks.CHECKS[name](Place(group, CPU, few=True))


@pytest.mark.parametrize(
    ("name", "told"), tiered([("parity", "is off by 1e-09")], [("overlap", "differs in repetition 0")])
)
def test_checks_notice(name: str, told: str) -> None:
    with pytest.raises(RankError, match=f"rank 1 of 2 failed first .*{told}"):
        run_ranks(breaks, 2, name)


@pytest.mark.slow
def test_the_program_starts_its_ranks() -> None:
    command = [sys.executable, "-m", "tests.gpu.ranks", "stress", "--device", "cpu", "--few"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (ranks.LACKING, "needs CUDA\n"), run.stderr


def test_what_a_kernel_of_nccl_hides_is_what_runs_beside_it() -> None:
    timeline = [
        Kernel("pack", 0, 10),
        Kernel("ncclDevKernel_AllGather", 14, 24),
        Kernel("intra", 12, 18),
        Kernel("intra on another stream", 16, 20),
        Kernel("fold", 24, 30),
        Kernel("ncclDevKernel_ReduceScatter", 40, 44),
    ]
    (_, late, part), (_, later, none) = ranks.hiding(timeline)
    assert (late, part) == (4, 0.6) and (later, none) == (10, 0.0)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others() -> None:
    right, said = ending.check(2, "cpu", few=True)
    assert right and "CommunicationError" in said and "exit codes [1, -9]" in said, said


def test_ranks_that_go_on_or_hang_are_wrong() -> None:
    trouble = Trouble("dies", "sequence")
    assert ending.verdict(trouble, Ended([1, -9], 2.0, ["CommunicationError", "before"]))[0]
    assert not ending.verdict(trouble, Ended([0, -9], 2.0, ["end", "before"]))[0]
    assert not ending.verdict(trouble, Ended([None, -9], 60.0, ["before", "before"]))[0]
    assert len(ending.troubles("cuda", few=False)) == 6
