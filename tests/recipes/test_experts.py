"""Training with experts: the balance of their load is that of all ranks, it is saved, and the host waits once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.mesh import whole_group
from recipes import config, data, generate, optim
from recipes import train as program
from recipes.load import load_recipe
from recipes.record import Record
from tests.recipes.test_step import Records
from tests.support.device import DEVICE, Device
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks

EXPERTS = "model.moe={experts: 4, dim: 8, shared: 4, auxiliary: 0.1, bias_rate: 0.01}"
EXACT = ["train.dtype=float64", "optim.lr=1e-4", "optim.schedule=constant", "optim.warmup=0", "train.accumulation=2"]
STEPS = 3


def run_of(recipe: config.Recipe, records: Any) -> program.Run:
    parallel = recipe.parallel
    mesh = hsp.init_mesh(dp=parallel.dp, sp=parallel.sp or 1)
    sp = config.sequence_parallel(recipe, mesh["sp"].get_group())
    corpus = data.read_corpus(recipe.data)
    return program.Run(recipe, corpus, records, mesh, whole_group(mesh), sp, "cpu")


def trained(group: Any, recipe: config.Recipe) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The metrics and the weights after some steps; every rank holds the same bits."""
    records = Records()
    run = run_of(recipe, records)
    for step in range(1, STEPS + 1):
        run.train_step(step, False)
    run.compare_parameters()
    return records.steps, {name: weight.clone() for name, weight in run.state()["model"].items()}


def test_experts_train_alike_on_any_mesh(tiny: Path, tmp_path: Path) -> None:
    """Losses, the load, weights and biases, of one rank and of dp 2 x sp 2."""
    options = [f"out={tmp_path}", EXPERTS, *EXACT]
    ((want, weights),) = run_ranks(trained, 1, load_recipe(str(tiny), options))
    recipe = load_recipe(str(tiny), [*options, "parallel.dp=2", "parallel.sp=2"])
    for rank, (steps, others) in enumerate(run_ranks(trained, 4, recipe)):
        for one, other in zip(want, steps, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-9), f"rank {rank}"
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-9), f"rank {rank}"
            assert one["expert_load"] == other["expert_load"] > 1, f"rank {rank}"
        for name, weight in weights.items():
            assert_close(f"rank {rank}: {name}", others[name], weight, 1e-9)
    biases = [weight for name, weight in weights.items() if name.endswith("mlp.bias")]
    assert len(biases) == 2 and all(bias.any() for bias in biases)


def test_the_auxiliary_loss_is_part_of_the_training(tiny: Path, tmp_path: Path) -> None:
    """With a large factor the routers' gradients are others, and the recorded loss is still that of the tokens."""
    options = [f"out={tmp_path}", *EXACT]
    found = []
    for factor in ("0.0", "50.0"):
        recipe = load_recipe(str(tiny), [*options, EXPERTS.replace("0.1", factor)])
        ((steps, _),) = run_ranks(trained, 1, recipe)
        found.append(steps[0])
    assert found[0]["loss"] == found[1]["loss"]
    assert found[1]["grad_norm"] > 2 * found[0]["grad_norm"]


def saved_and_read(group: Any, recipe: config.Recipe) -> None:
    records = Record(config.run_folder(recipe), recipe)
    records.prepare({"corpus": {"fingerprint": data.read_corpus(recipe.data).fingerprint}})
    run = run_of(recipe, records)
    for step in range(1, STEPS + 1):
        run.train_step(step, False)
    run.save()
    want = {name: weight.clone() for name, weight in run.state()["model"].items()}
    records.finish("stopped", run.facts(), None)
    again = run_of(recipe, Records())
    assert again.step == STEPS
    got = generate.load_model(config.run_folder(recipe)).state_dict()
    for name, weight in want.items():
        assert torch.equal(again.state()["model"][name], weight), name
        assert torch.equal(got[name], weight), name


def test_biases_are_saved_with_the_weights(tiny: Path, tmp_path: Path) -> None:
    run_ranks(saved_and_read, 1, load_recipe(str(tiny), [f"out={tmp_path}", EXPERTS]))


def on_the_device(group: Any, recipe: config.Recipe) -> None:
    """One pass in float32, by torch's grouped product; its gradients are those of a product for each expert."""
    run = run_of(recipe, Records())
    windows = data.training_windows(run.corpus, recipe.data.length, 0, 1, range(2))
    names, routing = [name for name, _ in run.model.named_parameters()], []
    loss, count = run.loss(windows, routing)
    want = torch.autograd.grad(loss + run.balance.loss(routing, count), list(run.model.parameters()))
    with Device() as device:
        run.model, run.device = device.move(run.model), str(DEVICE)
        run.optimizer = optim.Optimizer(run.model, recipe.optim)
        run.balance = program.Balance(run.model, group)
        routing = []
        device.clear()
        loss, count = run.loss(windows, routing)
        (loss + run.balance.loss(routing, count)).backward()
        run.balance.busiest()
        run.balance.step()
        assert not device.stops, dict(device.stops)
        for name, weight, gradient in zip(names, run.model.parameters(), want, strict=True):
            assert_close(name, weight.grad.data_here, gradient, 1e-4)  # type: ignore[union-attr]


def test_the_host_waits_for_no_expert(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny), [f"out={tmp_path}", EXPERTS])
    run_ranks(on_the_device, 1, replace(recipe, train=replace(recipe.train, dtype="float32")))
