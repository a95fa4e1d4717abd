"""One step of training: the host of a GPU waits once in it, and its time includes the optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hybrid_sp as hsp
from hybrid_sp.mesh import whole_group
from recipes import config, data, optim
from recipes import train as program
from recipes.load import load_recipe
from tests.support.device import DEVICE, Device
from tests.support.ranks import run_ranks


class Records:
    """The lines that a run records."""

    active = False

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def train(self, values: dict[str, Any]) -> None:
        self.steps.append(values)

    def ignore(self, *_: Any) -> None:
        pass

    begin = validation = flush = ignore


@contextmanager
def started(recipe: config.Recipe) -> Iterator[tuple[program.Run, Records]]:
    """A run of one process, at its first step."""
    mesh, records = hsp.init_mesh(), Records()
    sp = config.sequence_parallel(recipe, mesh["sp"].get_group())
    corpus = data.read_corpus(recipe.data)
    yield program.Run(recipe, corpus, records, mesh, whole_group(mesh), sp, "cpu"), records  # type: ignore[arg-type]


@torch.no_grad()
def step_by_formula(adamw: torch.optim.AdamW) -> None:
    """AdamW, Loshchilov and Hutter 2019, algorithm 2."""
    for group in adamw.param_groups:
        (one, two), lr = group["betas"], group["lr"]
        for p in group["params"]:
            m, v, t = (adamw.state[p][key] for key in ("exp_avg", "exp_avg_sq", "step"))
            t += 1
            m.mul_(one).add_(p.grad, alpha=1 - one)
            v.mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
            p.mul_(1 - lr * group["weight_decay"])
            p -= lr * (m / (1 - one ** t.double())) / ((v / (1 - two ** t.double())).sqrt() + group["eps"])


def on_the_device(group: Any, recipe: config.Recipe) -> None:
    with started(recipe) as (run, records):
        run.train_step(1, False)
        run.train_step(2, True)
        want = [p.detach().clone() for p in run.model.parameters()]
    adamw = torch.optim.AdamW
    with started(recipe) as (run, again), Device() as device, pytest.MonkeyPatch.context() as patch:
        run.model, run.device = device.move(run.model), str(DEVICE)
        # torch's own kernel, which reads nothing, is for devices that exist.
        patch.setattr(torch.optim, "AdamW", lambda *given, fused, **options: adamw(*given, **options))
        patch.setattr(adamw, "step", step_by_formula)
        run.optimizer = optim.Optimizer(run.model, recipe.optim)
        run.train_step(1, False)
        device.clear()
        assert run.train_step(2, True)
        assert len(device.stops) == 1 and sum(device.stops.values()) == 1, dict(device.stops)
        assert next(iter(device.stops)).startswith("a value read by the host"), dict(device.stops)
    for step, other in zip(records.steps, again.steps, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-12)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-12)
    for p, q in zip(want, run.model.parameters(), strict=True):
        torch.testing.assert_close(q.data_here, p, rtol=1e-9, atol=1e-12)  # type: ignore[attr-defined]


@pytest.mark.parametrize("pack", [False, True])
def test_the_host_waits_once_in_a_step(tiny: Path, tmp_path: Path, pack: bool) -> None:
    options = (f"out={tmp_path}", "train.dtype=float64", "train.accumulation=2", f"data.pack={str(pack).lower()}")
    run_ranks(on_the_device, 1, load_recipe(str(tiny), options))


def by_the_clock(group: Any, recipe: config.Recipe) -> list[float]:
    """Tokens per second by a clock that moves while the loss is computed (1 s), in the optimiser (10 s), and in
    validation (100 s) and saving (1000 s)."""
    now = 0.0

    def after(seconds: float, function: Any) -> Any:
        def run(*given: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*given)

        return run

    with started(recipe) as (run, records), pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "time", SimpleNamespace(perf_counter=lambda: now))
        run.since = now
        patch.setattr(run, "loss", after(1.0, run.loss))
        patch.setattr(run.optimizer, "step", after(10.0, run.optimizer.step))
        patch.setattr(run, "validate", after(100.0, lambda: None))
        patch.setattr(run, "save", after(1000.0, lambda: None))
        run.loop()
    return [step["tokens_per_second"] for step in records.steps]


def test_tokens_per_second_include_the_optimiser_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny), (f"out={tmp_path}",))
    recipe = replace(recipe, train=replace(recipe.train, steps=5, validate_every=1))
    (found,) = run_ranks(by_the_clock, 1, recipe)
    tokens = recipe.train.batch * recipe.data.length
    assert found == [tokens / 1.0, *[round(tokens / 11.0, 1)] * 4], "the first read comes before any optimiser"
