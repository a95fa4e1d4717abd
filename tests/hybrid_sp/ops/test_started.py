"""Operators that are started and finished apart: two exchanges in flight at once, in one order on every rank."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.exchange import EXCHANGES
from tests.hybrid_sp.test_overlap import counted, in_flight
from tests.support.nccl import messages_of_nccl
from tests.support.ranks import run_ranks

H, D, LENGTH = 2, 4, 30


def calls(shard: hsp.Shard) -> dict[str, tuple[Any, tuple[Tensor, ...], dict[str, Any]]]:
    """Every operator in steps, with leaves of this rank."""
    make = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(1, LENGTH, *shape, generator=make, dtype=torch.float64)
        return shard.take(x).requires_grad_()

    def whole(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64).requires_grad_()

    qkv = [tuple(leaf(H, D) for _ in "qkv") for _ in range(3)]
    latent = (leaf(H, D + 2), leaf(3), leaf(2), whole(H, D, 3), whole(H, D, 3))
    given: dict[str, dict[str, Any]] = {"shard": {"shard": shard}}
    return {
        "linear": (hsp.linear_attention, qkv[0], {"log_decay": -leaf(H).square(), **given["shard"]}),
        "softmax": (hsp.softmax_attention, qkv[1], {"sinks": whole(H), **given["shard"]}),
        "delta": (hsp.delta_rule, qkv[2], {"beta": leaf(H).sigmoid(), **given["shard"]}),
        "latent": (hsp.latent_attention, latent, given["shard"]),
    }


def results(group: Any, apart: bool, options: dict[str, Any]) -> tuple[list[Tensor], list[tuple[str, str, str]]]:
    """Outputs and gradients of all operators, and the order of launches and waits as (what, tag, direction)."""
    shard = hsp.SequenceParallel(group, layout="zigzag", **options).shard(LENGTH)
    todo = calls(shard)
    leaves = [x for _, args, _ in todo.values() for x in args]
    with hsp.ledger() as book:
        if apart:
            started = [operator.start(*args, **kwargs) for operator, args, kwargs in todo.values()]
            outputs = [one.finish() for one in started]
        else:
            outputs = [operator(*args, **kwargs) for operator, args, kwargs in todo.values()]
        grads = torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)
    moments = [(row.launched, ("launch", row.tag, row.direction)) for row in book.rows]
    moments += [(wait.begin, ("wait", wait.tag, wait.direction)) for wait in book.waits]
    return [o.detach() for o in outputs] + list(grads), [entry for _, entry in sorted(moments, key=lambda m: m[0])]


def check_order(group: Any) -> None:
    together, order = results(group, True, {})
    alone, _ = results(group, False, {})
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True)), "bit by bit"
    for direction in ("forward", "backward"):
        kinds = [what for what, _, way in order if way == direction]
        assert kinds == ["launch"] * 4 + ["wait"] * 4, (direction, order)


@pytest.mark.parametrize("world", [2, 3])
def test_all_exchanges_start_before_any_is_finished_forward_and_backward(world: int) -> None:
    run_ranks(check_order, world)


def check_nccl(group: Any, exchange: str) -> None:
    alone, _ = results(group, False, {"linear": exchange})
    with messages_of_nccl():
        together, _ = results(group, True, {"linear": exchange})
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_messages_of_two_exchanges_meet_in_order(exchange: str) -> None:
    run_ranks(check_nccl, 3 if exchange == "star" else 2, exchange)


def dropped(group: Any) -> None:
    shard = hsp.SequenceParallel(group).shard(LENGTH)
    for operator, args, kwargs in calls(shard).values():
        with counted() as made:
            started = operator.start(*args, **kwargs)
            assert in_flight(made) > 0
            del started
            gc.collect()
            assert in_flight(made) == 0, "what is in flight is drained"
        started = operator.start(*args, **kwargs)
        started.finish()
        with pytest.raises(RuntimeError, match="finished twice"):
            started.finish()


def test_a_call_that_is_dropped_leaves_nothing_in_flight() -> None:
    run_ranks(dropped, 2)


def test_a_start_refuses_what_the_call_refuses() -> None:
    x = torch.zeros(1, 3, 2, 4)
    with pytest.raises(ValueError, match="linear_attention: q and k must have one shape"):
        hsp.linear_attention.start(x, x[:, :2], x)
    with pytest.raises(ValueError, match="scale must be .*, not a tensor"):
        hsp.softmax_attention.start(x, x, x, scale=torch.ones(()))  # type: ignore[arg-type]
