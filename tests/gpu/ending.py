"""What becomes of a run one of whose ranks dies, or leaves out a layer: all others must end too, in time.

    python -m tests.gpu.ending TROUBLE DEVICE CHECK       one rank, started by `check`

Gloo raises CommunicationError on every rank. NCCL's watchdog ends the process once the timeout has passed; with
TORCH_NCCL_BLOCKING_WAIT=1 it raises as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch

import hybrid_sp as hsp
from analysis.bench.device import allow_any_triton
from analysis.bench.ranks.network import loopback
from hybrid_sp.comm import groups

ROOT = Path(__file__).parents[2]
PATIENCE = {"cpu": 15.0, "cuda": 20.0}  # the timeout of a collective
SLACK = 40.0  # seconds more for starting, for the watchdog, and for ending


class Trouble(NamedTuple):
    """What the last rank does, which `check` of SequenceParallel is on, and whether NCCL's waits block the host."""

    kind: str  # dies, or skips a layer
    check: str
    blocking: bool = False

    def __str__(self) -> str:
        return f"{self.kind}, check {self.check}{', blocking waits' if self.blocking else ''}"


def troubles(device: str, few: bool) -> list[Trouble]:
    found = [Trouble("dies", "sequence"), Trouble("skips", "calls")]
    if few:
        return found[:1]
    found += [Trouble("skips", "off")]
    return found + [Trouble(one.kind, one.check, True) for one in found] if device == "cuda" else found


def rank(kind: str, device: str, check: str) -> None:
    """A layer that all ranks call, and then the trouble."""
    allow_any_triton()
    patience = timedelta(seconds=PATIENCE[device])
    group = hsp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), device=device, timeout=patience)["sp"].get_group()
    last = groups.rank(group) == groups.size(group) - 1
    shard = hsp.SequenceParallel(group, check=False if check == "off" else check).shard(256)
    q, k, v = (torch.randn(1, shard.tokens, 2, 16, device=device) for _ in range(3))

    def layer(words: str) -> None:
        o = hsp.linear_attention(q, k, v, shard=shard)
        assert isinstance(o, torch.Tensor)
        print(words, o.sum().item(), flush=True)  # waits for the device

    layer("before")
    if last and kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if not (last and kind == "skips"):
        layer("after")
    hsp.softmax_attention(q, k, v, shard=shard).sum().item()
    layer("end")


class Ended(NamedTuple):
    """The exit codes of all ranks, None for those that had to be killed; seconds since the first one ended; and the
    last lines."""

    codes: list[int | None]
    seconds: float
    said: list[str]


def watch(trouble: Trouble, ranks: int, device: str, port: int) -> Ended:
    """Run all ranks, and wait until they have ended, or patience has."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if trouble.blocking:
        shared["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    command = [sys.executable, "-m", "tests.gpu.ending", trouble.kind, device, trouble.check]
    outputs = [tempfile.TemporaryFile("w+") for _ in range(ranks)]  # noqa: SIM115 (closed with the process)
    running = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | place | shared | {"RANK": str(i)}, stdout=output, stderr=output
        )
        for i, ((_, place), output) in enumerate(zip(loopback(ranks).ranks, outputs, strict=True))
    ]
    first, ends = None, time.monotonic() + PATIENCE[device] + SLACK
    while time.monotonic() < ends and any(process.poll() is None for process in running):
        if first is None and any(process.poll() is not None for process in running):
            first = time.monotonic()
        time.sleep(0.05)
    seconds = time.monotonic() - (first or ends)
    codes = [process.poll() for process in running]
    said = []
    for process, output in zip(running, outputs, strict=True):
        process.kill()
        process.wait()
        output.seek(0)
        said.append(([line for line in output.read().splitlines() if line.strip()] or [""])[-1][:300])
    return Ended(codes, seconds, said)


def verdict(trouble: Trouble, ended: Ended) -> tuple[bool, str]:
    """Whether every rank has ended by itself and not one of the healthy ones as if nothing had been."""
    healthy = ended.codes[:-1]
    right = None not in ended.codes and all(healthy)
    lines = [f"{trouble}: exit codes {ended.codes}, {ended.seconds:.1f} s after the first"]
    return right, "\n  ".join([*lines, *(f"rank {i}: {said}" for i, said in enumerate(ended.said))])


def check(ranks: int, device: str, few: bool) -> tuple[bool, str]:
    """Every trouble, all at once, since each takes a timeout."""
    from concurrent.futures import ThreadPoolExecutor

    from analysis.bench.ranks.launch import free_port

    chosen = troubles(device, few)
    ports = [free_port() for _ in chosen]
    with ThreadPoolExecutor(len(chosen)) as pool:
        ended = list(pool.map(lambda one: watch(one[0], ranks, device, one[1]), zip(chosen, ports, strict=True)))
    verdicts = [verdict(*one) for one in zip(chosen, ended, strict=True)]
    wrong = sum(not right for right, _ in verdicts)
    return not wrong, "\n".join([*(words for _, words in verdicts), f"{len(chosen)} troubles, {wrong} end wrongly"])


if __name__ == "__main__":
    rank(*sys.argv[1:])
