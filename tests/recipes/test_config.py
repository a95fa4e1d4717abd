"""What the keys of a recipe stand for: the layout, the strategies, the recomputed blocks and other weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import hybrid_sp as hsp
from hybrid_sp.comm.link import Link
from recipes import config
from recipes.config import Recipe
from recipes.load import dump, load_recipe, load_resolved
from recipes.validate import validate

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("asked", "ratio", "layout"),
    [
        ("auto", "1/4", "zigzag"),
        ("auto", "0", "contiguous"),
        ("zigzag", "0", "zigzag"),
        ("contiguous", "1", "contiguous"),
    ],
)
def test_layout_auto_is_zigzag_if_any_block_is_softmax(asked: str, ratio: str, layout: str) -> None:
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"parallel.layout={asked}", f"model.ratio={ratio}"])
    assert config.layout(recipe) == layout


def test_strategies_reach_the_engine() -> None:
    asked = ["parallel.overlap=[softmax]", "parallel.linear=pipeline", "parallel.link={latency: 1e-4, bandwidth: 1e9}"]
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", asked)
    validate(recipe, 2)
    sp = config.sequence_parallel(recipe, None)
    assert (sp.linear, sp.overlap, sp.link) == ("pipeline", ("softmax",), Link(latency=1e-4, bandwidth=1e9))
    assert sp.overlaps("softmax") and not sp.overlaps("linear") and hash(sp) is not None
    assert config.sequence_parallel(Recipe(), None) == hsp.SequenceParallel(None, layout="zigzag")
    off = load_recipe(ROOT / "recipes/quickstart.yaml", ["parallel.overlap=false"])
    assert config.sequence_parallel(off, None).overlap is False


@pytest.mark.parametrize(
    ("asked", "blocks"),
    [
        ([], ()),
        (["train.recompute=full"], (0, 1, 2, 3, 4, 5, 6, 7)),
        (["train.recompute=selective"], (1, 3, 5, 7)),
        (["train.recompute=selective", "train.recompute_blocks=[6,0]"], (0, 6)),
        (["train.recompute=selective", "train.recompute_blocks=[]"], ()),
        (["train.recompute=selective", "train.recompute_blocks=N"], (3, 7)),
        (["train.recompute=selective", "train.recompute_blocks=L"], (0, 1, 2, 4, 5, 6)),
    ],
)
def test_which_blocks_are_recomputed(asked: list[str], blocks: tuple[int, ...], tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", asked)
    validate(recipe, 2)
    assert config.recomputed_blocks(recipe.model, recipe.train) == blocks
    (tmp_path / "resolved.yaml").write_text(dump(recipe))
    again = load_resolved(tmp_path / "resolved.yaml")
    assert config.recomputed_blocks(again.model, again.train) == blocks
    assert config.difference(load_recipe(ROOT / "recipes/quickstart.yaml"), recipe) == []


@pytest.mark.parametrize(
    ("backend", "pattern"),
    [("torch", "[gla]"), ("triton", "[gla,softmax]"), ("fla", "[kda,softmax]"), ("flash_attn", "[kda,sliding_window]")],
)
def test_a_backend_that_a_block_has(backend: str, pattern: str) -> None:
    """It may change when a run is resumed: weights depend on it by rounding alone."""
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"model.backend={backend}", f"model.pattern={pattern}"])
    validate(recipe, 1)
    assert config.difference(replace(recipe, model=replace(recipe.model, backend="auto")), recipe) == []


def test_difference_names_what_changes_the_weights() -> None:
    old = Recipe()
    assert config.difference(old, replace(old, name="x", parallel=config.ParallelConfig(dp=2))) == []
    moved = replace(old, data=config.DataConfig(files="there", validation="v", test="t"))
    assert config.difference(old, moved) == [], "whether it is the same text is seen by its fingerprint"
    assert config.difference(old, replace(old, data=config.DataConfig(pack=True))) == ["data.pack (False -> True)"]
    new = replace(old, train=config.TrainConfig(seed=3), model=config.ModelConfig(ratio="1/8"))
    assert config.difference(old, new) == ["model.ratio (1/4 -> 1/8)", "train.seed (0 -> 3)"]
