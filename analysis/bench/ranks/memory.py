"""Memory that softmax attention makes besides its results, all key heads at once and one at a time, on four ranks.

`memory` starts the ranks, each of which runs this file. The attention kernels are replaced by ones that only allocate
what they return: the memory is the same, and 64K tokens take seconds instead of minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hybrid_sp as hsp
from analysis.bench.measure import ROOT, Claim, Result, Row, Sizes
from analysis.bench.meter import Meter
from hybrid_sp.comm import collectives, groups
from hybrid_sp.comm.groups import Group
from hybrid_sp.kernels.softmax import tiled as masked

RANKS, KEY_HEADS, WIDTH = 4, 8, 8
LET_GO_SECONDS = 0.02
AT_MOST = 0.35  # of the memory of all key heads at once
KINDS = [(layout, keep) for layout in ("contiguous", "zigzag") for keep in (True, False)]


class Use(NamedTuple):
    """Bytes of one call: what stays after forward, with its output, and what forward and backward need at most on top.

    Backward's count its gradients of q, k and v.
    """

    kept: int
    forward: int
    backward: int

    @property
    def transient(self) -> int:
        return max(self.forward, self.backward)


def use_of(sp: hsp.SequenceParallel, length: int, dtype: torch.dtype = torch.float32, repetitions: int = 3) -> Use:
    """One call on this rank, the least of a few: the thread of a collective may let go of its tensors late."""
    shard = sp.shard(length)
    q, k, v, do = (torch.randn(1, shard.tokens, KEY_HEADS, WIDTH, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = []
    for _ in range(repetitions):
        with Meter() as meter:
            o = hsp.softmax_attention(*leaves, shard=shard)
            peak = meter.peak
            time.sleep(LET_GO_SECONDS)
            kept = meter.live
            meter.restart()
            torch.autograd.grad(o, leaves, do)
            found.append((kept, peak - kept, meter.peak - kept))
        del o
    return Use(*(min(values) for values in zip(*found, strict=True)))


@contextmanager
def kernels_that_only_allocate() -> Iterator[None]:
    """Attention in the precision of sums, as on the CPU, without the work."""

    def wide(*tensors: Tensor) -> list[Tensor]:
        return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        q, k, v = wide(q, k, v)
        return torch.zeros_like(q), q.new_zeros(q.shape[:3])

    def attend_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, *_: Any) -> tuple[Tensor, ...]:
        do, q, k, v, o = wide(do, q, k, v, o)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    before: tuple[Callable[..., Any], Callable[..., Any]] = masked.attend, masked.attend_backward
    masked.attend, masked.attend_backward = attend, attend_backward  # type: ignore[assignment]
    try:
        yield
    finally:
        masked.attend, masked.attend_backward = before


def most(group: Group, length: int, layout: str, keep: bool, dtype: torch.dtype = torch.float32) -> list[Use]:
    """All key heads at once, and one at a time: the use of the rank that uses most."""
    uses = []
    for heads in (None, 1):
        sp = hsp.SequenceParallel(group, layout=layout, kv_heads_per_gather=heads, keep_kv=keep)
        ranks = collectives.gather_objects(use_of(sp, length, dtype), group)
        uses.append(Use(*(max(values) for values in zip(*ranks, strict=True))))
    return uses


def memory(sizes: Sizes, out: Path) -> Result:
    """What one call keeps and needs, in every layout, keys kept and not."""
    found, length = out / "uses.json", sizes.memory_length
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [sys.executable, *launcher, "-m", "analysis.bench.ranks.memory", str(length), str(found)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines, rows, claims = [], [], []
    for (layout, keep), (whole, one) in zip(KINDS, json.loads(found.read_text()), strict=True):
        words = f"{layout}, {'KV kept' if keep else 'gathered again'}"
        for name, use in (("all heads at once", Use(*whole)), ("one head", Use(*one))):
            rows.append(Row(contender=f"{words}, {name}", length=length, values=[use.transient]))
            shown = " | ".join(f"{x / 2**20:.1f}" for x in (*use, use.transient))
            lines.append(f"| {words} | {name} | {shown} |")
        ratio = Use(*one).transient / Use(*whole).transient
        claims.append(Claim(what=f"{words}: one head over all at once", measured=ratio, at_most=AT_MOST))
    return Result(
        title=f"memory of softmax attention, {length} tokens on {RANKS} ranks, {KEY_HEADS} heads of {WIDTH}, fp32",
        unit="bytes",
        header=(
            "| keys and values | at a time | kept, MiB | forward on top | backward on top | transient, the greater |\n"
            "|---|---|---|---|---|---|"
        ),
        lines=lines,
        rows=rows,
        claims=claims,
    )


def main() -> None:
    """On one rank, started by `memory`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("length", type=int)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    mesh = hsp.init_mesh(sp=RANKS)
    group = mesh["sp"].get_group()
    with kernels_that_only_allocate():
        uses = [most(group, options.length, layout, keep) for layout, keep in KINDS]
    if groups.rank(group) == 0:
        options.out.write_text(json.dumps(uses))
    collectives.barrier(group)


if __name__ == "__main__":
    main()
