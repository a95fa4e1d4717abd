"""Mixers side by side on ranks: all exchanges are in flight before any is waited for, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import hybrid_sp as hsp
from layers import side_by_side
from layers.side_by_side import SideBySide, SideBySideSpec
from tests.layers.cases import mixer_spec
from tests.layers.formulas.parts import CONTEXT
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks

NAMES = ("gla", "softmax", "kda", "rwkv6", "mla", "short_conv")
LENGTH, DOCUMENTS = 41, (0, 5, 30, 41)


def block() -> SideBySide:
    options: dict[str, dict[str, Any]] = {"kda": {"conv": 0}}
    specs = tuple((name, mixer_spec(name, **options.get(name, {}))) for name in NAMES)
    mixers = SideBySideSpec(specs=specs, join="mean").build(replace(CONTEXT, kv_heads=4)).double()
    make = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in mixers.parameters():
            weight.copy_(torch.randn(weight.shape, generator=make, dtype=torch.float64) / 4)
    return mixers


def run_mixer(mixer: Any, x: torch.Tensor, shard: hsp.Shard) -> torch.Tensor:
    """The output of a mixer that does all its work when it is its turn to finish."""
    y: torch.Tensor = mixer(x, shard)[0]
    return y


def run(group: Any, documents: tuple[int, ...] | None, one_by_one: bool) -> dict[str, Any]:
    mixers, shard = block(), hsp.SequenceParallel(group, layout="zigzag").shard(LENGTH, documents)
    x = torch.randn(1, LENGTH, CONTEXT.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = shard.take(x).requires_grad_()
    with hsp.ledger() as book, pytest.MonkeyPatch.context() as patch:
        if one_by_one:
            patch.setattr(side_by_side, "start_mixer", lambda mixer, *given: partial(run_mixer, mixer, *given))
        y, _ = mixers(x, shard)
        grads = torch.autograd.grad(y.square().sum(), [x, *mixers.parameters()])
    moments = [(row.launched, "launch", row.tag, row.direction) for row in book.rows]
    moments += [(wait.begin, "wait", wait.tag, wait.direction) for wait in book.waits]
    order = [entry[1:] for entry in sorted(moments) if entry[2] != "conv"]
    return {"y": y.detach(), "grads": grads, "order": order}


def check(group: Any, documents: tuple[int, ...] | None) -> None:
    together, alone = (run(group, documents, one_by_one) for one_by_one in (False, True))
    assert torch.equal(together["y"], alone["y"])
    for i, (a, b) in enumerate(zip(together["grads"], alone["grads"], strict=True)):
        assert_close(f"gradient {i}", a, b, 1e-13)  # autograd adds the gradients of x in another order
    for direction in ("forward", "backward"):
        kinds = [what for what, _, way in together["order"] if way == direction]
        assert kinds == sorted(kinds) and kinds.count("launch") == 5, (direction, together["order"])
        kinds = [what for what, _, way in alone["order"] if way == direction]
        assert kinds != sorted(kinds), "the counts see the difference"


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_all_exchanges_are_in_flight_before_any_is_waited_for(documents: tuple[int, ...] | None) -> None:
    run_ranks(check, 2, documents)
