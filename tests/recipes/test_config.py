"""Recipes: what wins over what, and that every mistake is an error that names the key and what to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import hybrid_sp as hsp
from hybrid_sp.collectives import Link
from recipes import config
from recipes.config import Recipe, RecipeError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("optim: {lr: 3e-3, clip: 2.0}\ntrain: {steps: 40}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\noptim: {clip: 3.0}\nmodel: {depth: 4}\n")
    return tmp_path / "mine.yaml"


def test_later_wins(recipe_file: Path) -> None:
    recipe = config.load(recipe_file, ["model.depth=8", "train.seed=1", "train.seed=2"])
    assert recipe.optim.weight_decay == Recipe().optim.weight_decay  # dataclass
    assert (recipe.optim.lr, recipe.train.steps) == (3e-3, 40)  # base
    assert recipe.optim.clip == 3.0  # recipe
    assert (recipe.model.depth, recipe.train.seed) == (8, 2)  # command line, the last


def test_numbers_are_numbers(recipe_file: Path) -> None:
    recipe = config.load(recipe_file, ["optim.lr=1e-3", "model.ratio=0", "optim.betas=[0.8,0.99]", "optim.clip=null"])
    assert recipe.optim.lr == 0.001 and isinstance(recipe.optim.lr, float)
    assert recipe.model.ratio == "0"
    assert (tuple(recipe.optim.betas), recipe.optim.clip) == ((0.8, 0.99), None)


def test_options_of_mixers_and_patterns(recipe_file: Path) -> None:
    recipe = config.load(recipe_file, ["model.mixers.gla.expand_k=0.5", "model.pattern=[gla,softmax]"])
    assert recipe.model.mixers == {"gla": {"expand_k": 0.5}}
    assert recipe.model.pattern == ["gla", "softmax"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "mine"),
        (["name=other/cell"], "other/cell"),
        (["model.ratio=1/8", "train.steps=20"], "mine-ratio-1-8-steps-20"),
        (["parallel.linear=ring", "parallel.overlap=[linear,softmax]"], "mine-linear-ring-overlap-linear-softmax"),
        (["parallel.keep_kv=false", "train.recompute=full", "train.trace=true"], "mine-keep_kv-false"),
        (["parallel.sp=2", "checkpoint.keep=3", "wandb.mode=disabled", "out=elsewhere", "train.threads=1"], "mine"),
        (["model.mixers.gla.expand_k=0.5"], "mine-expand_k-0.5"),
        (["model.backend=torch"], "mine-backend-torch"),
    ],
)
def test_the_name_says_what_the_command_line_changed(recipe_file: Path, overrides: list[str], name: str) -> None:
    assert config.load(recipe_file, overrides).name == name


def test_the_run_folder_and_the_resolved_recipe(recipe_file: Path, tmp_path: Path) -> None:
    recipe = config.load(recipe_file, ["out=there", "model.mixers.gla.expand_k=0.5"])
    assert config.run_folder(recipe) == Path("there/mine-expand_k-0.5")
    (tmp_path / "resolved.yaml").write_text(config.dump(recipe))
    assert config.load_resolved(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.ration=1/8", ["unknown key 'model.ration'", "'model.ratio'"]),
        ("ratio=1/8", ["unknown key 'ratio'", "'model.ratio'"]),
        ("trian.steps=3", ["unknown key 'trian.steps'", "'train.steps'"]),
        ("data.lenght=3", ["unknown key 'data.lenght'", "'data.length'"]),
        ("train.steps=many", ["train.steps='many'", "Integer"]),
        ("train.steps=1.5", ["train.steps=1.5", "Integer"]),
        ("optim.lr=fast", ["optim.lr='fast'", "Float"]),
        ("optim.betas=[0.9]", ["optim.betas=[0.9]", "length"]),
        ("train.device=gpu", ["train.device='gpu'", "'auto', 'cpu', 'cuda'"]),
        ("parallel.layout=zag", ["parallel.layout='zag'", "'zigzag'"]),
        ("train.recompute=half", ["train.recompute='half'", "'none', 'full', 'selective'"]),
        ("parallel.keep_kv=many", ["parallel.keep_kv='many'", "bool"]),
        ("parallel.link=5", ["parallel.link=5", "Link"]),
        ("parallel.link.latncy=5", ["parallel.link={'latncy': 5}", "Key 'latncy' not in 'Link'"]),
        ("model=3", ["model=3"]),
        ("train.steps", ["'train.steps' is not of the form key=value"]),
        ("name=", ["name=None"]),
    ],
)
def test_unknown_keys_and_wrong_types(recipe_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        config.load(recipe_file, [override])
    assert all(word in str(caught.value) for word in [*words, f"argument {override!r}".split(" ")[1]]), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {stpes: 3}", ["mine.yaml", "unknown key 'train.stpes'", "'train.steps'"]),
        ("train: 3", ["mine.yaml", "train=3"]),
        ("train: [", ["mine.yaml", "not valid YAML"]),
        ("- 1", ["mine.yaml", "key: value"]),
        ("base: gone.yaml", ["gone.yaml", "cannot be read"]),
        ("base: mine.yaml", ["leads back to itself"]),
    ],
)
def test_files_that_cannot_be_read(recipe_file: Path, text: str, words: list[str]) -> None:
    recipe_file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        config.load(recipe_file)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_link_needs_latency_and_bandwidth(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match="parallel.link.bandwidth is missing"):
        config.load(recipe_file, ["parallel.link.latency=5"])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: cannot be read .* such as recipes/quickstart\.yaml"):
        config.load(tmp_path / "gone.yaml")


# Overrides of the quickstart, the number of processes, and what the error must say.
IMPOSSIBLE = [
    ("model.ratio=1/3", 1, ["ratio 1/3", "does not tile a depth of 8", "depth to 6 or 9"]),
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
    ("parallel.kv_heads_per_gather=0", 1, ["parallel.kv_heads_per_gather=0", "above 0"]),
    ("parallel.link={latency: 0, bandwidth: 0}", 1, ["parallel.link.bandwidth=0", "above 0"]),
    ("parallel.link={latency: -1, bandwidth: 1e9}", 1, ["parallel.link.latency=-1", "at least 0"]),
    ("train.recompute_blocks=[1]", 1, ["train.recompute_blocks=[1]", "needs train.recompute=selective, not none"]),
    ("train.recompute_blocks=[8]", 1, ["train.recompute_blocks=[8]", "L, N", "from 0 to 7"]),
    ("train.recompute_blocks=NL", 1, ["train.recompute_blocks=NL", "L, N", "null"]),
    ("train.recompute_blocks=[true]", 1, ["train.recompute_blocks=[True]", "block numbers"]),
    ("name=../elsewhere", 1, ["name='../elsewhere'", "relative path"]),
]


@pytest.mark.parametrize(("override", "world", "words"), IMPOSSIBLE, ids=[case[0] for case in IMPOSSIBLE])
def test_impossible_values(override: str, world: int, words: list[str]) -> None:
    key = override.split("=")[0]
    more = ["parallel.dp=2"] if key == "train.validation_sequences" else []
    if key == "train.recompute_blocks" and override != "train.recompute_blocks=[1]":
        more = ["train.recompute=selective"]
    recipe = config.load(ROOT / "recipes/quickstart.yaml", [override, *more])
    with pytest.raises(RecipeError) as caught:
        config.validate(recipe, world)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_recipes_that_come_along_are_possible() -> None:
    recipe = config.load(ROOT / "recipes/quickstart.yaml")
    assert recipe.model.depth == 8
    for world in (1, 2, 4):
        config.validate(recipe, world)


def test_the_mesh_takes_what_dp_leaves() -> None:
    recipe = Recipe(parallel=config.ParallelConfig(dp=2))
    assert config.mesh_shape(recipe, 8) == (2, 4)


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
    recipe = config.load(ROOT / "recipes/quickstart.yaml", [f"parallel.layout={asked}", f"model.ratio={ratio}"])
    assert config.layout(recipe) == layout


def test_strategies_reach_the_engine() -> None:
    asked = ["parallel.overlap=[softmax]", "parallel.linear=pipeline", "parallel.link={latency: 1e-4, bandwidth: 1e9}"]
    recipe = config.load(ROOT / "recipes/quickstart.yaml", asked)
    config.validate(recipe, 2)
    sp = config.sequence_parallel(recipe, None)
    assert (sp.linear, sp.overlap, sp.link) == ("pipeline", ("softmax",), Link(latency=1e-4, bandwidth=1e9))
    assert sp.overlaps("softmax") and not sp.overlaps("linear") and hash(sp) is not None
    assert config.sequence_parallel(Recipe(), None) == hsp.SequenceParallel(None, layout="zigzag")
    off = config.load(ROOT / "recipes/quickstart.yaml", ["parallel.overlap=false"])
    assert config.sequence_parallel(off, None).overlap is False


def test_heads_that_do_not_divide_are_refused_before_anything_starts() -> None:
    for kind, mixer in (("linear", "gla"), ("softmax", "softmax")):
        recipe = config.load(ROOT / "recipes/quickstart.yaml", [f"parallel.{kind}=ulysses", "model.kv_heads=2"])
        config.validate(recipe, 2)
        heads = 4 if kind == "linear" else 2
        with pytest.raises(RecipeError, match=rf"parallel.{kind}=ulysses cuts the {heads} .*heads of {mixer} into 3"):
            config.validate(recipe, 3)
    grouped = ["model.linear=mamba2", "parallel.linear=ulysses"]  # by itself with one head of queries and keys
    with pytest.raises(RecipeError, match="parallel.linear=ulysses cuts the 1 .*heads of mamba2 into 2"):
        config.validate(config.load(ROOT / "recipes/quickstart.yaml", grouped), 2)
    grouped.append("model.mixers.mamba2.groups=2")
    config.validate(config.load(ROOT / "recipes/quickstart.yaml", grouped), 2)


def test_ring_attention_refuses_linear_blocks_that_are_no_product_of_q_and_k() -> None:
    for mixer in ("gla", "rwkv6", "hgrn2", "delta_net", "gated_delta_net", "kda"):
        asked = [f"model.linear={mixer}", "parallel.linear=ring_attention"]
        with pytest.raises(RecipeError, match=f"parallel.linear=ring_attention takes no {mixer}: "):
            config.validate(config.load(ROOT / "recipes/quickstart.yaml", asked), 2)
    for mixer in ("linear", "lightning", "retention", "mamba2", "based", "rebased", "sliding_window"):
        asked = [f"model.linear={mixer}", "parallel.linear=ring_attention"]
        config.validate(config.load(ROOT / "recipes/quickstart.yaml", asked), 2)


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
    recipe = config.load(ROOT / "recipes/quickstart.yaml", asked)
    config.validate(recipe, 2)
    assert config.recomputed_blocks(recipe.model, recipe.train) == blocks
    (tmp_path / "resolved.yaml").write_text(config.dump(recipe))
    again = config.load_resolved(tmp_path / "resolved.yaml")
    assert config.recomputed_blocks(again.model, again.train) == blocks
    assert config.difference(config.load(ROOT / "recipes/quickstart.yaml"), recipe) == []


@pytest.mark.parametrize(
    ("backend", "pattern"),
    [("torch", "[gla]"), ("triton", "[gla,softmax]"), ("fla", "[kda,softmax]"), ("flash_attn", "[kda,sliding_window]")],
)
def test_a_backend_that_a_block_has(backend: str, pattern: str) -> None:
    """It may change when a run is resumed: weights depend on it by rounding alone."""
    recipe = config.load(ROOT / "recipes/quickstart.yaml", [f"model.backend={backend}", f"model.pattern={pattern}"])
    config.validate(recipe, 1)
    assert config.difference(replace(recipe, model=replace(recipe.model, backend="auto")), recipe) == []


def test_difference_names_what_changes_the_weights() -> None:
    old = Recipe()
    assert config.difference(old, replace(old, name="x", parallel=config.ParallelConfig(dp=2))) == []
    new = replace(old, train=config.TrainConfig(seed=3), model=config.ModelConfig(ratio="1/8"))
    assert config.difference(old, new) == ["model.ratio (1/4 -> 1/8)", "train.seed (0 -> 3)"]
