"""Two halves of a sequence, the state handed from one to the other, are one run over the whole, on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives, groups
from hybrid_sp.kernels.reference import chunks
from tests.hybrid_sp.cases import Case, delta_cases, halo_cases, linear_cases, weights
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

HALF = 41  # tokens of the first half
STATES = ("initial", "initial_z")


def run(case: Case, x: dict[str, Tensor], group: Any, halves: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Outputs of every half on this rank, the last state, and the gradients of the leaves x of the whole sequence."""
    outputs, state = [], {name: x[name] for name in STATES if name in x}
    loss = torch.zeros((), dtype=torch.float64)
    given = weights(torch.empty(x_tokens(x), 1), 0)[:, 0]
    for start, end in halves:
        shard = hsp.SequenceParallel(group, layout=case.layout, check="calls").shard(end - start)
        here = {name: v if case.whole(name) else shard.take(v[:, start:end]) for name, v in x.items()}
        o, finals = case.call(here | state, shard)
        state = dict(zip(STATES, finals, strict=False))
        whole = shard.gather(o)
        outputs.append(whole)
        rows = given[start:end].view(1, -1, *(1,) * (whole.ndim - 2))
        loss = loss + (o * shard.take(rows.expand_as(whole))).sum()
    ranks = groups.size(group)
    loss = loss + sum((final * weights(final, 1)).sum() for final in state.values()) / ranks
    grads = torch.autograd.grad(loss, list(x.values()))
    got = {"o": torch.cat(outputs, 1), **{f"final {name}": final for name, final in state.items()}}
    for name, grad in zip(x, grads, strict=True):
        got[f"d {name}"] = collectives.all_reduce(grad.clone(), group, tag="test")
    return {name: value.detach() for name, value in got.items()}


def x_tokens(x: dict[str, Tensor]) -> int:
    return next(iter(x.values())).shape[1]


def check_halves(group: Any, cases: list[Case]) -> None:
    chunks.CHUNK, default = 8, chunks.CHUNK
    try:
        for case in cases:
            x = {name: value.requires_grad_() for name, value in case.inputs().items()}
            length = x_tokens(x)
            once = run(case, x, group, [(0, length)])
            twice = run(case, x, group, [(0, HALF), (HALF, length)])
            for name, want in once.items():
                assert_close(f"{case} {name} on rank {groups.rank(group)}", twice[name], want, 1e-10)
    finally:
        chunks.CHUNK = default


WAYS = [(1, "contiguous", 1), (3, "zigzag", 2)]
REST = [(world, layout, 1) for world in (1, 2, 3) for layout in ("contiguous", "zigzag")][1:]


@pytest.mark.parametrize(("world", "layout", "step"), tiered(WAYS, REST))
def test_two_halves_are_the_whole(world: int, layout: str, step: int) -> None:
    cases = [*linear_cases(), *delta_cases(), *halo_cases()]
    cases = [replace(case, layout=layout) for case in cases if case.states and case.documents is None]
    assert len(cases) > 10
    run_ranks(check_halves, world, cases[::step], deadline=120)
