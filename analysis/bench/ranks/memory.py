"""The memory of softmax attention on four ranks: keys and values of all heads gathered at once, and one head at a time.

`memory` starts the ranks, and each of them runs this file. All of the memory is proportional to the tokens, so a short
sequence stands for a long one; the last claim compares two lengths.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import hybrid_sp as hsp
from analysis.bench.meter import Meter
from analysis.bench.ranks.launch import answer, ask
from analysis.bench.ranks.network import loopback
from analysis.bench.result import Claim, Result, Row
from analysis.bench.sizes import Sizes
from analysis.tables import Table
from hybrid_sp.comm import collectives
from hybrid_sp.comm.groups import Group

RANKS, KEY_HEADS, WIDTH = 4, 8, 8
REPETITIONS = 3
LET_GO_SECONDS = 0.02
AT_MOST = 0.35  # the bound on one head at a time, over all key heads at once
KINDS = [(layout, keep) for layout in ("contiguous", "zigzag") for keep in (True, False)]
AT_A_TIME = {"all heads at once": None, "one head": 1}  # key heads in a gather


class Use(NamedTuple):
    """The bytes of one call.

    kept      bytes alive after forward, the output among them
    forward   the most bytes alive during forward, without `kept`
    backward  the most bytes alive during backward, without `kept`; they include the gradients of q, k and v
    """

    kept: int
    forward: int
    backward: int

    @property
    def transient(self) -> int:
        return max(self.forward, self.backward)


def measure_use(sp: hsp.SequenceParallel, length: int) -> Use:
    """Measure one call on this rank.

    It returns the least of a few calls, because a collective's thread may free its tensors late.
    """
    shard = sp.shard(length)
    q, k, v, do = (torch.randn(1, shard.tokens, KEY_HEADS, WIDTH) for _ in range(4))
    leaves = [leaf.requires_grad_() for leaf in (q, k, v)]
    found = []
    for _ in range(REPETITIONS):
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


def measure_kind(group: Group, length: int, layout: str, keep: bool) -> list[Use]:
    """Measure one layout, with keys kept or not, at every choice of AT_A_TIME, on the rank with the greatest use."""
    uses = []
    for heads in AT_A_TIME.values():
        sp = hsp.SequenceParallel(group, layout=layout, kv_heads_per_gather=heads, keep_kv=keep)
        ranks = collectives.gather_objects(measure_use(sp, length), group)
        uses.append(Use(*(max(values) for values in zip(*ranks, strict=True))))
    return uses


def measure_all(lengths: list[int], group: Group) -> list[list[list[Use]]]:
    """Measure every kind at every length."""
    return [[measure_kind(group, length, layout, keep) for layout, keep in KINDS] for length in lengths]


def memory(sizes: Sizes, out: Path) -> Result:
    """Measure the memory of softmax attention, with one key head at a time and all at once, on four ranks."""
    lengths = sizes.memory_lengths
    found: list[Any] = ask(__name__, lengths, loopback(RANKS))
    names = [f"{layout}, {'KV kept' if keep else 'gathered again'}" for layout, keep in KINDS]
    uses = {
        (name, heads, length): Use(*use)
        for length, kinds in zip(lengths, found, strict=True)
        for name, both in zip(names, kinds, strict=True)
        for heads, use in zip(AT_A_TIME, both, strict=True)
    }
    shorter, longer = lengths
    of_longer = {(name, heads): use for (name, heads, length), use in uses.items() if length == longer}
    growth = max(
        use.transient / longer / (uses[name, heads, shorter].transient / shorter)
        for (name, heads), use in of_longer.items()
    )
    whole, one = AT_A_TIME
    header = (
        "keys and values",
        "at a time",
        "kept, MiB",
        "forward on top",
        "backward on top",
        "transient, the greater",
    )
    return Result(
        title=f"memory of softmax attention, {longer} tokens on {RANKS} ranks, {KEY_HEADS} heads of {WIDTH}, fp32",
        unit="bytes",
        body=[
            Table(
                header=header,
                rows=tuple(
                    (*kind, *(f"{size / 2**20:.2f}" for size in (*use, use.transient)))
                    for kind, use in of_longer.items()
                ),
                numbers=frozenset(header[2:]),
            )
        ],
        rows=[
            Row(contender=f"{name}, {heads}", length=length, values=[use.transient])
            for (name, heads, length), use in uses.items()
        ],
        claims=[
            *(
                Claim(
                    what=f"{name}: one head over all at once",
                    measured=of_longer[name, one].transient / of_longer[name, whole].transient,
                    at_most=AT_MOST,
                )
                for name in names
            ),
            Claim(what=f"transient memory of a token at T={longer} over T={shorter}", measured=growth, at_most=1.01),
        ],
    )


if __name__ == "__main__":
    answer(measure_all)
