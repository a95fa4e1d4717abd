"""A host that computes on a device never stops within a block: it neither copies to the device nor reads from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hybrid_sp as hsp
from layers.block import Block
from layers.registry import MIXERS
from tests.layers.test_compile import WIDE, block_of
from tests.support.device import DEVICE, Device
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

LENGTH, DOCUMENTS = 64, (0, 5, 40, 64)
OPTIONS: dict[str, dict[str, Any]] = {  # sliding_window has the plain options of softmax
    "softmax": {"conv": 3, "qk_norm": True, "rope_fraction": 0.5, "gate": "channel", "sinks": True},
    "kda": {"gate_lower_bound": -5.0, "full_rank": "both", "key_heads": 2},
    "linear": {"conv": 3},
}


def step(block: Block, x: Tensor, shard: hsp.Shard, recomputed: bool) -> list[Tensor]:
    """The output, and the gradients of the input and of the weights."""
    x.requires_grad_()
    if recomputed:
        y, *_ = checkpoint(block, x, shard, use_reentrant=False, context_fn=hsp.checkpoint_contexts)
    else:
        y, *_ = block(x, shard)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


def on_the_device(group: Any, mixers: list[str], documents: tuple[int, ...] | None, recomputed: bool) -> None:
    sp = hsp.SequenceParallel(group, layout="zigzag")
    for mixer in mixers:
        shard = sp.shard(LENGTH, documents)
        x = torch.randn(1, shard.tokens, WIDE.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        options = OPTIONS.get(mixer, {})
        want = step(block_of(mixer, **options), x.clone(), shard, recomputed)
        with Device() as device:
            block = device.move(block_of(mixer, **options))
            for _ in range(2):  # the first makes plans of this shard
                device.clear()
                got = step(block, device.put(x), shard, recomputed)
            assert not device.stops and not device.copies, f"{mixer}: {device.stops} {device.copies}"
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.device == DEVICE
            assert_close(f"{mixer}, tensor {i}", a.data_here, b, 1e-12)


@pytest.mark.parametrize(
    ("documents", "recomputed"), tiered([(None, False), (DOCUMENTS, True)], [(None, True), (DOCUMENTS, False)])
)
def test_no_mixer_stops_the_host(documents: tuple[int, ...] | None, recomputed: bool) -> None:
    run_ranks(on_the_device, 2, list(MIXERS), documents, recomputed, deadline=120)


STOPS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "arithmetic": (lambda x: (x * 2).sum() + torch.arange(4, device=x.device)[1:], 0),
    "a slice filled": (lambda x: x[1:].fill_(0.0), 0),
    "item": (lambda x: x.sum().item(), 1),
    "a branch": (lambda x: 1 if x.sum() > 0 else 0, 1),
    "numbers": (lambda x: torch.tensor([1.0, 2.0], device=x.device), 1),
    "new numbers": (lambda x: x.new_tensor([1.0, 2.0]), 1),
    "a copy": (lambda x: torch.arange(4).to(x.device), 1),
    "a copy that is said not to block": (lambda x: torch.arange(4).to(x.device, non_blocking=True), 1),
    "a copy from pinned memory": (lambda x: torch.arange(4).pin_memory().to(x.device), 1),
    "both": (lambda x: torch.arange(4).pin_memory().to(x.device, non_blocking=True), 0),
    "a list": (lambda x: x.tolist(), 1),
    "back": (lambda x: x.cpu(), 1),
    "a list as index": (lambda x: x[[0, 2]], 2),
    "a mask": (lambda x: x[x > 0], 1),
    "nonzero": (lambda x: x.nonzero(), 1),
}


@pytest.mark.parametrize("name", STOPS)
def test_the_device_counts_what_stops_a_host(name: str) -> None:
    run, count = STOPS[name]
    with Device() as device:
        run(device.put(torch.ones(4)))
    assert sum(device.stops.values()) == count, device.stops
