"""The recurrence that hybrid_sp/README.md writes by the contract of `kernels/phases.py` is a plain token loop, on every
rank."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives, groups
from hybrid_sp.exchange import EXCHANGES
from tests.support.oracle import assert_close
from tests.support.pages import blocks
from tests.support.ranks import run_ranks

LENGTH = 23  # spans of three and four tokens under zigzag
LAYOUTS = ("contiguous", "zigzag")


@functools.lru_cache
def dense_attention() -> Any:
    (block,) = (one for one in blocks("hybrid_sp/README.md", "python") if "class DensePhases" in one.code)
    return block.run()["dense_attention"]


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"q": (2, LENGTH, 3, 4), "k": (2, LENGTH, 3, 4), "v": (2, LENGTH, 3, 5), "angle": (2, LENGTH, 3)}
    shapes |= {"initial_state": (2, 3, 4, 5)}
    return {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}


def turned(q: Tensor, k: Tensor, v: Tensor, angle: Tensor, **options: Any) -> Any:
    """The README's operator on matrices that turn channel i with channel i + K/2, by the angle of each token."""
    cos, sin = (
        torch.diag_embed(part(angle)[..., None].expand(*angle.shape, k.shape[-1] // 2))
        for part in (torch.cos, torch.sin)
    )
    turn = torch.cat([torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)], -2)
    return dense_attention()(q, k, v, turn, **options)


def weights(x: Tensor) -> Tensor:
    """The gradient of the loss with respect to x, drawn by its shape."""
    return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(x.ndim))


def token_loop(q: Tensor, k: Tensor, v: Tensor, angle: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """One token after another: a pair of channels is a complex number, which a turn multiplies by exp(i angle)."""

    def paired(x: Tensor, dim: int) -> Tensor:
        return torch.complex(*x.chunk(2, dim))

    S, outputs = paired(initial_state, -2), []
    for q_t, k_t, v_t, angle_t in zip(*(x.unbind(1) for x in (q, k, v, angle)), strict=True):
        turn = torch.exp(1j * angle_t)[..., None, None]
        S = turn * S + paired(k_t, -1)[..., None] * v_t[..., None, :]
        outputs.append((paired(q_t, -1).conj()[..., None] * S).real.sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), torch.cat([S.real, S.imag], -2)


def truth() -> dict[str, Tensor]:
    x = inputs()
    o, final = token_loop(**x)
    grads = torch.autograd.grad((o * weights(o)).sum() + (final * weights(final)).sum(), list(x.values()))
    return {"o": o.detach(), "final": final.detach(), **dict(zip(x, grads, strict=True))}


def check_ranks(group: Any, want: dict[str, Tensor]) -> None:
    """By every exchange in both layouts: each rank's tokens, and the states of the whole sequence."""
    for linear, layout in itertools.product(EXCHANGES, LAYOUTS):
        shard = hsp.SequenceParallel(group, layout=layout, linear=linear, check="calls").shard(LENGTH)
        x = inputs()
        here = {name: value if name == "initial_state" else shard.take(value) for name, value in x.items()}
        o, final = turned(**here, shard=shard, return_final_state=True)
        loss = (o * shard.take(weights(want["o"]))).sum() + (final * weights(final)).sum() / groups.size(group)
        got = {"o": o, "final": final, **dict(zip(x, torch.autograd.grad(loss, list(x.values())), strict=True))}
        got["initial_state"] = collectives.all_reduce(got["initial_state"].clone(), group, tag="test")
        for name, value in got.items():
            expected = want[name]
            if name not in ("final", "initial_state"):
                expected = shard.take(expected)
                value = value if name == "o" else shard.take(value)
            assert_close(f"{name}, {linear}, {layout}, rank {groups.rank(group)}", value.detach(), expected, 1e-10)


@pytest.mark.parametrize("world", [1, 3])
def test_agrees_with_the_token_loop(world: int) -> None:
    run_ranks(check_ranks, world, truth())


def test_nothing_is_exchanged_by_one_device() -> None:
    """No state enters and nobody reads the final one, forward and backward."""
    x = inputs()
    x["initial_state"].data.zero_()
    o, _ = token_loop(**x)
    del x["initial_state"]
    want = torch.autograd.grad((o * weights(o)).sum(), list(x.values()))
    with hsp.ledger() as book:
        got = turned(**x)
        grads = torch.autograd.grad((got * weights(got)).sum(), list(x.values()))
    assert not book.calls
    for name, value, expected in zip(["o", *x], (got, *grads), (o, *want), strict=True):
        assert_close(name, value.detach(), expected.detach(), 1e-10)


def test_documents_are_refused() -> None:
    x = inputs()
    shard = hsp.SequenceParallel(None).shard(LENGTH, [0, 5, LENGTH])
    with pytest.raises(ValueError, match="takes no packed documents"):
        turned(*(x[name][:1] for name in ("q", "k", "v", "angle")), shard=shard)
