"""The device of a run, and what is set for the whole process before the run uses it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.config import Recipe, RecipeError
from recipes.device import RECORDER_FILE, choose_device, set_up
from tests.recipes.conftest import Train


def recipe_of(**train: Any) -> Recipe:
    recipe = Recipe()
    return replace(recipe, train=replace(recipe.train, **train))


@pytest.mark.parametrize(
    ("asked", "local", "seen", "visible", "device"),
    [
        ("auto", 2, 2, None, "cuda"),
        ("auto", 2, 1, None, "cpu"),
        ("auto", 2, 1, "3", "cuda"),  # the launcher shows each process a GPU of its own
        ("auto", 2, 1, "3,4", "cpu"),
        ("auto", 1, 0, None, "cpu"),
        ("cpu", 1, 1, None, "cpu"),
        ("cuda", 1, 1, None, "cuda"),
        ("cuda", 2, 1, None, None),
    ],
)
def test_a_run_takes_gpus_if_each_process_has_one(
    monkeypatch: pytest.MonkeyPatch, asked: str, local: int, seen: int, visible: str | None, device: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if device is None:
        with pytest.raises(RecipeError, match="needs one GPU for each of the 2 processes of this machine, but torch"):
            choose_device(recipe_of(device=asked))
    else:
        assert choose_device(recipe_of(device=asked)) == device


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An environment that may be changed; what set_up asks of torch is taken back."""
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"})
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(False)
    yield os.environ
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


def test_a_gpu_records_its_collectives_in_the_run_folder(environment: dict[str, str], tmp_path: Path) -> None:
    set_up(recipe_of(), "cuda", tmp_path)
    assert {name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"} == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        RECORDER_FILE: f"{tmp_path}/nccl_rank_",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    }
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_kernels_are_asked_for(environment: dict[str, str], tmp_path: Path) -> None:
    set_up(recipe_of(deterministic=True, keep_memory=False), "cpu", tmp_path)
    assert torch.are_deterministic_algorithms_enabled() and environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT" not in environment


def test_every_operator_has_a_deterministic_form(train: Train, tmp_path: Path) -> None:
    options = (
        "train.steps=2",
        "train.deterministic=true",
        "model.pattern=[gla,gated_delta_net,softmax]",
        "model.depth=3",
    )
    done = train(*options, "data.pack=true", ranks=2)
    assert done.ok, done
