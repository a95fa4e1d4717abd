"""The whole model with the sequence cut over ranks, against one device in float64, on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives, groups
from hybrid_sp.kernels.reference import chunks
from hybrid_sp.shard import LAYOUTS
from layers.config import ModelConfig
from layers.model import HybridLM
from layers.registry import MIXERS
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

# Five mixers, AdamW, batches of two sequences.

LENGTH, VOCAB = 30, 16
CONFIG = ModelConfig(
    vocab=VOCAB,
    dim=16,
    depth=5,
    heads=2,
    kv_heads=1,
    mlp_dim=16,
    pattern=["linear", "lightning", "retention", "gla", "softmax"],
)


@pytest.mark.parametrize("steps", tiered([3], [50]))
def test_model_trains_as_on_one_device(steps: int) -> None:
    run_ranks(compare_training, 4, steps, deadline=600.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How four ranks share a batch. `whole` is the group over which losses and gradients are summed."""

    name: str
    group: Any
    whole: Any
    rows: slice


ALONE = Plan(name="one device", group=None, whole=None, rows=slice(0, 2))


def plans_of(world: Any) -> list[Plan]:
    mesh = hsp.init_mesh(dp=2, sp=2)
    pair, dp_rank = mesh["sp"].get_group(), mesh["dp"].get_local_rank()
    return [
        Plan(name="sp 2", group=pair, whole=pair, rows=slice(0, 2)),
        Plan(name="sp 4", group=world, whole=world, rows=slice(0, 2)),
        Plan(name="dp x sp 2 x 2", group=pair, whole=world, rows=slice(dp_rank, dp_rank + 1)),
    ]


def adamw(model: HybridLM) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))


def compare_training(world: Any, steps: int) -> None:
    """At each step the gradients of every plan at the weights of one device, and the losses of every plan's own run."""
    plans = plans_of(world)
    model, *free = (HybridLM(CONFIG).double() for _ in [ALONE, *plans])
    optimizers = [adamw(one) for one in [model, *free]]
    for step, batch in enumerate(batches(LENGTH, steps)):
        loss, gradients = loss_and_gradients(model, ALONE, "contiguous", *batch)
        layout = LAYOUTS[step % 2]
        for plan, own_model in zip(plans, free, strict=True):
            where = f"step {step}, {plan.name}, {layout}, rank {groups.rank(world)}"
            _, taken = loss_and_gradients(model, plan, layout, *batch)
            for name, gradient in gradients.items():
                assert_close(f"{where}: gradient of {name}", taken[name], gradient, 1e-9)
            own_loss, _ = loss_and_gradients(own_model, plan, layout, *batch)
            assert_close(f"{where}: loss of its own run", own_loss, loss, 1e-9)
        for name, weight in model.named_parameters():
            weight.grad = gradients[name]
        for optimizer in optimizers:
            optimizer.step()


def loss_and_gradients(
    model: HybridLM, plan: Plan, layout: str, tokens_BL: Tensor, labels_BL: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss over all valid tokens and its gradients, which are also left in the parameters; on every rank."""
    shard = hsp.SequenceParallel(plan.group, layout=layout).shard(tokens_BL.shape[1])
    tokens_BT, labels_BT = (shard.take(x[plan.rows]) for x in (tokens_BL, labels_BL))
    model.zero_grad()
    loss, valid = model.loss(tokens_BT, labels_BT, shard)
    loss.backward()
    total = hsp.sum_gradients(model.parameters(), plan.whole, int(valid))
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return collectives.all_reduce(loss.detach(), plan.whole, tag="loss") / total, gradients


def batches(length: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and next-token labels [2, length]; every fifth batch leaves whole ranks without a valid label."""
    generator = torch.Generator().manual_seed(4)
    for step in range(steps):
        text = torch.randint(VOCAB, (2, length + 1), generator=generator)
        labels = text[:, 1:].clone()
        labels[:, -1] = -100
        if step % 5 == 0:
            labels[0], labels[1, : length // 2] = -100, -100
        yield text[:, :-1], labels


DOCUMENTS = (0, 1, 6, 7, 30, 75)


def of_every_mixer() -> tuple[HybridLM, Tensor]:
    """A model, and a text for it."""
    names = sorted(MIXERS)
    model = HybridLM(replace(CONFIG, dim=32, heads=4, kv_heads=2, depth=len(names), pattern=names)).double()
    return model, torch.randint(VOCAB, (1, DOCUMENTS[-1]), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("layouts", tiered([[*LAYOUTS]], [[*LAYOUTS[::-1]]]), ids=["one way", "the other"])
def test_documents_of_a_model_are_as_if_alone(layouts: list[str]) -> None:
    """A model of every mixer reads packed documents: its loss and gradients are means over their tokens, each document
    read alone by one device."""
    model, text = of_every_mixer()
    losses = []
    for begin, end in itertools.pairwise(DOCUMENTS):
        labels = F.pad(text[:, begin + 1 : end], (0, 1), value=-100)
        losses.append(model.loss(text[:, begin:end], labels)[0])
    want = sum(losses) / (DOCUMENTS[-1] - len(losses))
    gradients = torch.autograd.grad(want, list(model.parameters()))
    run_ranks(compare_documents, 4, layouts, want.detach(), gradients, deadline=120.0)


def compare_documents(world: Any, layouts: list[str], want: Tensor, gradients: tuple[Tensor, ...]) -> None:
    model, text = of_every_mixer()
    for plan, layout in zip(plans_of(world)[:2], layouts, strict=True):
        where = f"{plan.name}, {layout}, rank {groups.rank(world)}"
        shard = hsp.SequenceParallel(plan.group, layout=layout, check="calls").shard(DOCUMENTS[-1], DOCUMENTS)
        model.zero_grad()
        loss, valid = model.loss(shard.take(text), shard.labels(text), shard)
        loss.backward()
        total = hsp.sum_gradients(model.parameters(), plan.whole, int(valid))
        got = collectives.all_reduce(loss.detach(), plan.whole, tag="loss") / total
        assert_close(f"{where}: loss", got, want, 1e-9)
        for (name, weight), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert_close(f"{where}: gradient of {name}", weight.grad, gradient, 1e-9)


LONG = 150  # tokens: more than a chunk of 128


@pytest.mark.parametrize("steps", tiered([4], [50]))
def test_float32_runs_stay_as_close_as_two_chunk_sizes(steps: int) -> None:
    """Free-running training in float32: no plan strays further from one device than three times what another chunk size
    does there. The last run changes from sp 4 to one device half way, as a resumed run may."""
    want = losses_in_float32([ALONE] * steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", 128)
        allowed = 3 * distance(losses_in_float32([ALONE] * steps), want)
    for distances in run_ranks(distances_in_float32, 4, want, deadline=600.0):
        print(f"allowed {allowed:.1e}:", ", ".join(f"{name} {value:.1e}" for name, value in distances.items()))
        assert len(distances) == 4 and all(value <= allowed for value in distances.values()), (allowed, distances)


def distance(losses: Tensor, others: Tensor) -> float:
    """Root mean square over the steps of two runs."""
    return (losses - others).square().mean().sqrt().item()


def distances_in_float32(world: Any, want: Tensor) -> dict[str, float]:
    """The distance of the losses of each run from those of one device."""
    plans, steps = plans_of(world), len(want)
    runs = {plan.name: losses_in_float32([plan] * steps) for plan in plans}
    runs["sp 4, then one device"] = losses_in_float32([plans[1]] * (steps // 2) + [ALONE] * (steps - steps // 2))
    return {name: distance(losses, want) for name, losses in runs.items()}


def losses_in_float32(plans: list[Plan]) -> Tensor:
    """Losses of a run whose step i follows plan i."""
    model = HybridLM(CONFIG)
    optimizer = adamw(model)
    losses = []
    for plan, batch in zip(plans, batches(LONG, len(plans)), strict=True):
        losses.append(loss_and_gradients(model, plan, "zigzag", *batch)[0])
        optimizer.step()
    return torch.stack(losses).double()
