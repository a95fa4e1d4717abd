"""Several machines: network namespaces of this one, joined by a slow link, with a torchrun in each."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.bench.ranks import network
from recipes.record import read_metrics
from tests.recipes.conftest import Train
from tests.recipes.program import ROOT

MEGABITS = 100
DEADLINE = 600  # seconds
SETTINGS = ("train.dtype=float64", "optim.lr=1e-4", "optim.schedule=constant", "optim.warmup=0", "train.steps=3")


@pytest.fixture
def two_hosts() -> Iterator[list[network.Host]]:
    if reason := network.impossible():
        pytest.skip(reason)
    with network.hosts(2, MEGABITS) as hosts:
        yield hosts


@pytest.mark.slow
def test_two_machines_train_what_one_does(
    two_hosts: list[network.Host], tiny: Path, train: Train, tmp_path: Path
) -> None:
    """sp = 4 over two hosts of two processes each: spans, states and messages cross the link between them."""
    assert train(*SETTINGS, "name=one").ok
    arguments = [str(tiny), f"out={tmp_path}", "name=two", *SETTINGS]
    with contextlib.ExitStack() as stack:
        nodes = []
        for number, host in enumerate(two_hosts):
            said = stack.enter_context((tmp_path / f"node{number}.txt").open("w+"))
            place = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "2"]
            place += ["--master-addr", host.first_address, "--master-port", "29500"]
            command = [*host.prefix, sys.executable, "-m", "torch.distributed.run", *place, "-m", "recipes.train"]
            environment = os.environ | host.environment | {"OMP_NUM_THREADS": "1"}
            node = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stdout=said, stderr=said)
            stack.callback(node.kill)
            nodes.append(node)
        codes = [node.wait(DEADLINE) for node in nodes]
    said = "\n".join((tmp_path / f"node{number}.txt").read_text() for number in range(2))
    assert codes == [0, 0], said
    assert "4 processes on cpu: dp 1 x sp 4" in said
    one, two = (
        {(line["kind"], line["step"]): line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")}
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-9)


def test_a_kernel_that_lacks_a_part_is_named_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := network.impossible():
        pytest.skip(reason)
    run = network._run
    without = {"tc": ["tc", "qdisc", "add", "dev", "nothing"]}
    monkeypatch.setattr(network, "_run", lambda command: run(without.get(command[0], command)))
    assert "this machine refuses 'tc qdisc add" in str(network.impossible())
    assert f"hsp-probe-{os.getpid()}" not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout


def test_hosts_are_gone_afterwards(two_hosts: list[network.Host]) -> None:
    """Also where they fail to be made."""
    named = {host.name for host in two_hosts}
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in named)
    with pytest.raises(subprocess.CalledProcessError), network.hosts(2, MEGABITS):
        raise AssertionError("these hosts exist already")
    again = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert listed == again


def test_a_bench_that_is_ended_leaves_no_hosts(tmp_path: Path) -> None:
    if reason := network.impossible():
        pytest.skip(reason)

    def hosts_of(bench: subprocess.Popen[bytes]) -> list[str]:
        listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        return [line for line in listed.splitlines() if f"-{bench.pid}-" in line]

    command = [sys.executable, "-m", "analysis.bench", "overlap", "--out", str(tmp_path)]
    with (tmp_path / "said.txt").open("w") as said:
        bench = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        try:
            while not hosts_of(bench):
                assert bench.poll() is None, (tmp_path / "said.txt").read_text()
                time.sleep(0.1)
            bench.terminate()
            assert bench.wait(DEADLINE) == 143
        finally:
            bench.kill()
    assert not hosts_of(bench)
