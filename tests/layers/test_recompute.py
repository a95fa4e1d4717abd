"""Blocks that are computed again in backward: the same loss and gradients, bit by bit, and nothing is sent twice."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from layers.config import ModelConfig
from layers.model import HybridLM
from layers.registry import MIXERS
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

NAMES = sorted(MIXERS)
CONFIG = ModelConfig(
    vocab=16,
    dim=32,
    heads=4,
    kv_heads=2,
    mlp_dim=16,
    depth=len(NAMES),
    pattern=NAMES,
    mixers={
        "softmax": {"conv": 3, "qk_norm": True, "rope_fraction": 0.5, "gate": "channel", "sinks": True},
        "kda": {"gate_lower_bound": -5.0, "full_rank": "both", "key_heads": 2},
        "linear": {"conv": 3},
    },
)
LENGTH = 61
DOCUMENTS = (0, 1, 20, 61)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a forward and a backward pass come to: rows are (collective, kind, direction, bytes)."""

    loss: Tensor
    gradients: dict[str, Tensor]
    rows: list[tuple[str, str, str, int]]
    forwards: list[int]  # of each mixer


def passed(
    group: Any,
    recompute: Collection[int],
    layout: str,
    packed: bool,
    dtype: torch.dtype,
    config: ModelConfig = CONFIG,
    **strategies: Any,
) -> Pass:
    model = HybridLM(config, recompute).to(dtype)
    sp = hsp.SequenceParallel(group, layout=layout, check="calls", **strategies)
    shard = sp.shard(LENGTH, DOCUMENTS if packed else None)
    text = torch.randint(16, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    forwards = [0] * config.depth
    for number, block in enumerate(model.blocks):
        block.mixer.register_forward_hook(lambda *_, number=number: forwards.__setitem__(number, forwards[number] + 1))
    with hsp.ledger() as book:
        loss, _ = model.loss(shard.take(text), shard.labels(text), shard)
        loss.backward()
    return Pass(
        loss=loss.detach(),
        gradients={name: weight.grad for name, weight in model.named_parameters()},
        rows=[(row.collective, row.tag, row.direction, row.bytes) for row in book.rows],
        forwards=forwards,
    )


def compare(group: Any, dtype: torch.dtype) -> None:
    for layout, packed in (("contiguous", False), ("zigzag", True)):
        want = passed(group, (), layout, packed, dtype)
        assert want.forwards == [1] * CONFIG.depth
        for recompute in (range(CONFIG.depth), range(1, CONFIG.depth, 2)):
            got = passed(group, recompute, layout, packed, dtype)
            assert torch.equal(got.loss, want.loss)
            for name, gradient in want.gradients.items():
                assert torch.equal(got.gradients[name], gradient), name
            assert got.rows == want.rows, "the same collectives, in the same order"
            assert got.forwards == [1 + (number in recompute) for number in range(CONFIG.depth)]


ONE, TWO = (torch.float32, 1), (torch.float64, 2)


@pytest.mark.parametrize(("dtype", "ranks"), tiered([ONE, TWO], [(torch.float32, 2), (torch.float64, 1)]), ids=str)
def test_recomputed_blocks_change_nothing_and_send_nothing_again(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(compare, ranks, dtype, deadline=120.0)


STRATEGIES: list[dict[str, Any]] = [
    {"linear": "ring", "kv_heads_per_gather": 1},
    {"linear": "pipeline", "keep_kv": False},
    {"linear": "doubling", "keep_kv": False, "kv_heads_per_gather": 1},
    {"overlap": False},
]


def compare_strategies(group: Any) -> None:
    config = replace(CONFIG, depth=4, pattern=["gla", "gated_delta_net", "softmax", "rwkv6"])
    for strategies in STRATEGIES:
        want = passed(group, (), "zigzag", True, torch.float64, config, **strategies)
        got = passed(group, range(config.depth), "zigzag", True, torch.float64, config, **strategies)
        assert torch.equal(got.loss, want.loss)
        assert all(torch.equal(got.gradients[name], gradient) for name, gradient in want.gradients.items())
        assert sorted(got.rows) == sorted(want.rows), strategies


def test_every_exchange_is_replayed() -> None:
    run_ranks(compare_strategies, 2, deadline=120.0)


def kept_bytes(model: HybridLM) -> int:
    """Bytes that the forward pass keeps for backward, but for parameters."""
    kept: dict[int, int] = {}
    own = {weight.data_ptr() for weight in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    text = torch.randint(16, (1, 512))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss, _ = model.loss(text, text)
    assert loss.requires_grad
    return sum(kept.values())


def test_recomputed_blocks_keep_their_input_alone() -> None:
    config = replace(CONFIG, pattern=["gla", "softmax", "mamba2", "kda"], depth=4)
    none, half, full = (kept_bytes(HybridLM(config, blocks)) for blocks in ((), (1, 3), range(4)))
    assert full < half < none and full < 0.35 * none, (none, half, full)


def test_without_gradients_nothing_is_checkpointed() -> None:
    model = HybridLM(CONFIG, range(CONFIG.depth))
    text = torch.randint(16, (1, 12))
    with torch.no_grad():
        assert torch.equal(model(text), HybridLM(CONFIG)(text))
    logits, _ = model.step(text[:, 0], model.init_cache(1))
    assert logits.shape == (1, 16)


def test_blocks_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"recompute \[0, 4\] names blocks beyond 0 to 3"):
        HybridLM(replace(CONFIG, depth=4, pattern="LLLN"), [0, 4])
