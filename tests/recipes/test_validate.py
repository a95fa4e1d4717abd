"""Recipes that cannot be run: every mistake is an error that names the key, its value and what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes import config
from recipes.config import Recipe, RecipeError
from recipes.load import load_recipe
from recipes.validate import SEEDS, mesh_shape, processes, validate

ROOT = Path(__file__).parents[2]

# Overrides of the quickstart, the number of processes, and what the error must say.
IMPOSSIBLE = [
    ("model.ratio=1/3", 1, ["ratio 1/3", "does not tile a depth of 8", "is 3/8, or set depth to 6 or 9"]),
    ("model.ratio=3:1", 1, ["ratio '3:1' is not a fraction", "1/4"]),
    ("model.pattern=LLLX", 1, ["pattern 'LLLX'", "L (linear) and N (softmax)"]),
    ("model.linear=mamba", 1, ["linear mixer 'mamba'", "known: "]),
    ("model.heads=5", 1, ["model", "5 heads"]),
    ("model.kv_heads=3", 1, ["heads 4", "kv_heads 3"]),
    ("model.vocab=300", 1, ["model.vocab=300", "256"]),
    ("model.mixers.gla.expand=2", 1, ["option 'expand' of mixer 'gla'", "expand_k"]),
    ("model.backend=trito", 1, ["model: unknown backend 'trito'; did you mean 'triton'?", "known: auto, "]),
    ("model.backend=fla", 1, ["model.backend=fla", "none of a block", "linear_attention, softmax_attention", "=auto"]),
    ("data.length=3", 2, ["data.length=3", "4 spans of 2 ranks (zigzag)", "parallel.sp"]),
    ("parallel.dp=2", 3, ["parallel.dp=2", "3 processes"]),
    ("parallel.sp=4", 2, ["parallel.sp=4", "make 4 processes, but 2", "--nproc-per-node 4"]),
    ("parallel.dp=0", 1, ["parallel.dp=0", "at least 1"]),
    ("train.accumulation=3", 1, ["train.batch=2", "1 * 3 = 3"]),
    ("train.validation_sequences=15", 2, ["train.validation_sequences=15", "parallel.dp=2"]),
    ("train.steps=0", 1, ["train.steps=0", "above 0"]),
    ("train.sample=-1", 1, ["train.sample=-1"]),
    ("optim.lr=.inf", 1, ["optim.lr=inf"]),
    ("optim.lr=-1", 1, ["optim.lr=-1"]),
    ("optim.min_lr=1", 1, ["optim.min_lr=1", "optim.lr"]),
    ("optim.warmup=-1", 1, ["optim.warmup=-1", "at least 0"]),
    ("optim.betas=[0.9,1.0]", 1, ["optim.betas", "[0, 1)"]),
    ("checkpoint.keep=0", 1, ["checkpoint.keep=0"]),
    ("parallel.linear=rings", 1, ["parallel", "'rings'", "all_gather", "ring", "auto"]),
    ("parallel.softmax=rings", 1, ["parallel", "'rings'", "all_gather"]),
    ("parallel.check=true", 1, ["parallel.check=True", "sequence", "calls", "false"]),
    ("parallel.overlap=3", 1, ["parallel.overlap=3", "true, false or a list", "linear, softmax, conv"]),
    ("parallel.overlap=linear", 1, ["parallel.overlap=linear", "true, false or a list"]),
    ("parallel.overlap=[linear,delta]", 1, ["parallel.overlap=['linear', 'delta']", "linear, softmax, conv"]),
    ("parallel.nccl_ctas=0", 1, ["parallel.nccl_ctas=0", "above 0"]),
    ("parallel.kv_heads_per_gather=0", 1, ["parallel.kv_heads_per_gather=0", "above 0"]),
    ("parallel.link={latency: 0, bandwidth: 0}", 1, ["parallel.link.bandwidth=0", "above 0"]),
    ("parallel.link={latency: -1, bandwidth: 1e9}", 1, ["parallel.link.latency=-1", "at least 0"]),
    ("train.recompute_blocks=[1]", 1, ["train.recompute_blocks=[1]", "needs train.recompute=selective, not none"]),
    ("train.recompute_blocks=[8]", 1, ["train.recompute_blocks=[8]", "L, N", "from 0 to 7"]),
    ("train.recompute_blocks=NL", 1, ["train.recompute_blocks=NL", "L, N", "null"]),
    ("train.recompute_blocks=[true]", 1, ["train.recompute_blocks=[True]", "block numbers"]),
    ("name=../elsewhere", 1, ["name='../elsewhere'", "relative path"]),
    ("name=x/" + "a" * 241, 1, ["name=x/aaa", "a part of 241 bytes", "240"]),
    ("out=" + "é" * 150, 1, ["out=ééé", "a part of 300 bytes", "240"]),
    ("train.seed=20261128101500", 1, ["train.seed=20261128101500", "between 0 and 10,000,000,000,000"]),
    ("train.seed=-1", 1, ["train.seed=-1", "between 0 and 10,000,000,000,000"]),
    ("wandb.project=a/b", 1, ["wandb.project='a/b'", "none of / \\ # ? % :"]),
    ("wandb.project=a: b", 1, ["wandb.project='a: b'", "none of"]),
    ("wandb.project=" + "a" * 129, 1, ["wandb.project=", "1 to 128 letters"]),
]


@pytest.mark.parametrize(("override", "world", "words"), IMPOSSIBLE, ids=[case[0] for case in IMPOSSIBLE])
def test_impossible_values(override: str, world: int, words: list[str]) -> None:
    key = override.split("=")[0]
    more = ["parallel.dp=2"] if key == "train.validation_sequences" else []
    if key == "train.recompute_blocks" and override != "train.recompute_blocks=[1]":
        more = ["train.recompute=selective"]
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [override, *more])
    with pytest.raises(RecipeError) as caught:
        validate(recipe, world)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_recipes_that_come_along_are_possible() -> None:
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml")
    assert recipe.model.depth == 8
    for world in (1, 2, 4):
        validate(recipe, world)


def test_the_largest_seed_is_one_that_torch_takes() -> None:
    validate(load_recipe(ROOT / "recipes/quickstart.yaml", [f"train.seed={SEEDS}"]), 1)
    torch.Generator().manual_seed(SEEDS * 1_000_003 + 100_000)  # what recipes/train.py makes of it on a rank


@pytest.mark.parametrize("text", ["", "two", "0", "-1", "1.0", "1e9", "9" * 30])
def test_a_number_of_processes_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(RecipeError, match=f"the environment has WORLD_SIZE='{text}', which must be a number of proc"):
        processes()
    monkeypatch.delenv("WORLD_SIZE")
    assert processes() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "12")
    assert processes("LOCAL_WORLD_SIZE") == 12


def test_the_mesh_takes_what_dp_leaves() -> None:
    recipe = Recipe(parallel=config.ParallelConfig(dp=2))
    assert mesh_shape(recipe, 8) == (2, 4)


def test_heads_that_do_not_divide_are_refused_before_anything_starts() -> None:
    for kind, mixer in (("linear", "gla"), ("softmax", "softmax")):
        recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"parallel.{kind}=ulysses", "model.kv_heads=2"])
        validate(recipe, 2)
        heads = 4 if kind == "linear" else 2
        with pytest.raises(RecipeError, match=rf"parallel.{kind}=ulysses cuts the {heads} .*heads of {mixer} into 3"):
            validate(recipe, 3)
    grouped = ["model.linear=mamba2", "parallel.linear=ulysses"]  # by itself with one head of queries and keys
    with pytest.raises(RecipeError, match="parallel.linear=ulysses cuts the 1 .*heads of mamba2 into 2"):
        validate(load_recipe(ROOT / "recipes/quickstart.yaml", grouped), 2)
    grouped.append("model.mixers.mamba2.groups=2")
    validate(load_recipe(ROOT / "recipes/quickstart.yaml", grouped), 2)


def test_ring_attention_refuses_linear_blocks_that_are_no_product_of_q_and_k() -> None:
    for mixer in ("gla", "rwkv6", "hgrn2", "delta_net", "gated_delta_net", "kda"):
        asked = [f"model.linear={mixer}", "parallel.linear=ring_attention"]
        with pytest.raises(RecipeError, match=f"parallel.linear=ring_attention takes no {mixer}: "):
            validate(load_recipe(ROOT / "recipes/quickstart.yaml", asked), 2)
    for mixer in ("linear", "lightning", "retention", "mamba2", "based", "rebased", "sliding_window"):
        asked = [f"model.linear={mixer}", "parallel.linear=ring_attention"]
        validate(load_recipe(ROOT / "recipes/quickstart.yaml", asked), 2)
