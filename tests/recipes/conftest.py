"""Tiny runs for the tests of the training program: two blocks, 32 tokens, eight steps, and a text of their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipes.program import Outcome, run_program

TINY = """
model: {dim: 16, depth: 2, heads: 2, pattern: [gla, softmax]}
data: {files: FILES, length: 32}
train: {steps: 8, batch: 4, validate_every: 4, validation_sequences: 4, sample: 20, device: cpu, threads: 1}
optim: {lr: 1e-3, warmup: 2}
parallel: {timeout: 300, check: calls}
checkpoint: {every: 2}
wandb: {mode: disabled}
"""


def write_texts(folder: Path, seed: int = 0) -> str:
    """Four small files of words, one of them for validation; returns their glob."""
    draw = random.Random(seed)
    folder.mkdir()
    for name in ("one", "two", "three", "valid"):
        words = [draw.choice(["state", "decay", "chunk", "rank", "span", "\n"]) for _ in range(300)]
        (folder / f"{name}.txt").write_text(" ".join(words))
    return str(folder / "*.txt")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the recipe of a tiny run."""
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "tiny.yaml"
    path.write_text(TINY.replace("FILES", write_texts(folder / "texts")))
    return path


Train = Callable[..., Outcome]


@pytest.fixture
def train(tiny: Path, tmp_path: Path) -> Train:
    """Trains the tiny recipe with overrides into ``tmp_path / "run"``, on some ranks, with or without a fault."""

    def run(*overrides: str, ranks: int = 1, fault: str | None = None, rank: int = 0, nth: int = 1) -> Outcome:
        arguments = (str(tiny), f"out={tmp_path}", "name=run", *overrides)
        return run_program(*arguments, ranks=ranks, fault=fault, rank=rank, nth=nth)

    return run
