"""Recipes: what wins over what, and that every mistake is an error that names the key and what to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hybrid_sp as hsp
from hybrid_sp.comm.collectives import Link
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
        (["data.files=a/*.txt", "data.test=b"], "mine-files-a-.txt-test-b"),
        (["name=0010"], "0010"),
        (["model.ratio=01/8", "train.seed=007"], "mine-ratio-01-8-seed-007"),
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
        ("parallel.link.latncy=5", ["parallel.link={'latncy': '5'}", "Key 'latncy' not in 'Link'"]),
        ("model=3", ["model=3"]),
        ("train.steps", ["'train.steps' is not of the form key=value"]),
        ("name=", ["nothing behind the =", "name=null"]),
        ("data.files=", ["nothing behind the =", "data.files=null for none"]),
        ("=3", ["is not of the form key=value"]),
        ("train.steps=null", ["train.steps=None"]),
        ("train.steps=1:30", ["train.steps='1:30'", "Integer"]),
        ("train.steps=0x10", ["train.steps='0x10'", "Integer"]),
        ("optim.lr=1:30", ["optim.lr='1:30'", "Float"]),
        ("model.pattern=[gla", ["is not valid YAML: ", "in line 1, column 5", "model.pattern='\"[gla\"'"]),
        ("model.pattern=[*gla]", ["is not valid YAML: a name that begins with *"]),
        ("model.pattern={a: 1, a: 2}", ["is not valid YAML: a again"]),
        ("model.pattern=!!python/name:os.system", ["is not valid YAML: ", "could not determine a constructor"]),
        ("optim.betas=[0.9, 0.99", ["is not valid YAML: "]),
        ("parallel.link={latency: 0", ["is not valid YAML: "]),
        ("flies=*.txt", ["unknown key 'flies'"]),
        ("data.files=???", ["'???' stands for a missing value"]),
        ("optim.betas.0=0.5", ["optim.betas={'0': 0.5}"]),
        ("data.files=${oc.env:HOME}", ["holds ${...}", "not resolved", "write the value itself"]),
        ("model.pattern=['${oc.env:HOME}']", ["holds ${...}"]),
        ("model.mixers.gla={'${oc.env:HOME}': 1}", ["holds ${...}"]),
        ("data.files=a\udce9.txt", ["is not UTF-8", "a glob"]),
    ],
)
def test_unknown_keys_and_wrong_types(recipe_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        config.load(recipe_file, [override])
    assert all(word in str(caught.value) for word in [*words, f"argument {override!r}".split(" ")[1]]), caught.value
    assert "\n" not in str(caught.value)


TEXTS = [
    *("0010", "1_000", "12e4567", "3:1", "true", "~", ".inf", "2026-11-28"),
    *("*.txt", "[a].txt", "a: b", "a #b", "&a", "- c", "'it", "é"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_what_was_typed(recipe_file: Path, tmp_path: Path, text: str) -> None:
    """Of every key whose type is a string, in arguments, in files and in the run folder."""
    keys = ["name", "out", "model.ratio", "model.linear", "data.files", "data.test", "wandb.group", "parallel.softmax"]
    typed = config.load(recipe_file, [f"{key}={text}" for key in keys])
    optional = [key for key in keys if key in ("data.files", "data.test", "wandb.group")]
    said = config.flat(typed)
    assert [said[key] for key in keys] == [None if text == "~" and key in optional else text for key in keys]
    quoted = text.replace("'", "''")
    recipe_file.write_text(f"name: '{quoted}'\nmodel: {{linear: '{quoted}'}}\ndata: {{files: '{quoted}'}}\n")
    read = config.load(recipe_file)
    assert (read.name, read.model.linear, read.data.files) == (text, text, text)
    (tmp_path / "resolved.yaml").write_text(config.dump(read))
    assert config.load_resolved(tmp_path / "resolved.yaml") == read


@pytest.mark.parametrize("text", ["0010", "1_000", "12e4567", "3:1", "true", "on", ".5", "2026-11-28", "null"])
def test_text_of_a_file_needs_no_quotes(recipe_file: Path, text: str) -> None:
    recipe_file.write_text(f"name: {text}\nmodel: {{ratio: {text}}}\ndata:\n  files: {text}\n")
    read = config.load(recipe_file)
    assert (read.name, read.model.ratio, read.data.files) == (text, text, None if text == "null" else text)


def test_quotes_hold_text(recipe_file: Path) -> None:
    recipe = config.load(
        recipe_file, ['data.files="*.txt"', "wandb.group='null'", "train.steps='08'", "data.test=null"]
    )
    assert (recipe.data.files, recipe.wandb.group, recipe.train.steps, recipe.data.test) == ("*.txt", "null", 8, None)


def test_numbers_are_decimal(recipe_file: Path, tmp_path: Path) -> None:
    """YAML 1.1 reads 0010 as 8 and 1:30 as 90."""
    asked = ["train.steps=0010", "train.seed=1_000", "optim.lr=1e-3", "optim.betas=[0.8, .99]", "train.threads=null"]
    recipe = config.load(recipe_file, asked)
    assert (recipe.train.steps, recipe.train.seed, recipe.optim.lr, recipe.train.threads) == (10, 1000, 1e-3, None)
    assert tuple(recipe.optim.betas) == (0.8, 0.99)
    recipe_file.write_text("train: {steps: 0010, seed: 1_000}\noptim: {lr: 1e-3}\n")
    recipe = config.load(recipe_file)
    assert (recipe.train.steps, recipe.train.seed, recipe.optim.lr) == (10, 1000, 1e-3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("-2.5", -2.5), ("1E5", 1e5), ("3", 3), ("-0", 0), (".inf", float("inf")), ("Yes", True),
        ("off", False), ("~", None), ("[1, a, 0.5]", [1, "a", 0.5]), ("{a: {b: null}}", {"a": {"b": None}}),
        ("010", "010"), ("3:1", "3:1"), ("2026-11-28", "2026-11-28"), ("'1'", "1"), ("LN", "LN"), ("1_0", "1_0"),
    ],
)  # fmt: skip
def test_a_key_of_any_type_gets_what_yaml_means(recipe_file: Path, text: str, value: object) -> None:
    typed = config.load(recipe_file, [f"model.pattern={text}"]).model.pattern
    assert typed == value and type(typed) is type(value)
    recipe_file.write_text(f"model: {{pattern: {text}}}\n")
    assert config.load(recipe_file).model.pattern == value


def test_options_of_mixers_have_the_types_of_their_mixer(recipe_file: Path) -> None:
    options = ["hgrn2.lower_bound=0010", "sliding_window.window=0100", "gla.expand_k=1", "linear.normalize=no"]
    typed = config.load(recipe_file, [f"model.mixers.{option}" for option in options]).model.mixers
    recipe_file.write_text(
        "model: {mixers: {hgrn2: {lower_bound: 0010}, sliding_window: {window: 0100}, gla: {expand_k: 1}, "
        "linear: {normalize: no}}}"
    )
    assert (
        typed
        == config.load(recipe_file).model.mixers
        == {
            "hgrn2": {"lower_bound": "0010"},
            "sliding_window": {"window": 100},
            "gla": {"expand_k": 1.0},
            "linear": {"normalize": False},
        }
    )
    wrong = config.load(ROOT / "recipes/quickstart.yaml", ["model.mixers.gla.expand_k=1:3"])
    with pytest.raises(RecipeError, match="option 'expand_k' of mixer 'gla' is '1:3', a str; it must be a float"):
        config.validate(wrong, 1)


def test_secrets_of_the_environment_stay_there(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    strange = tmp_path / "${oc.env:SECRET}.yaml"
    for file in (recipe_file, strange):
        for text in ("wandb: {group: '${oc.env:SECRET}'}", "model: {pattern: ['${oc.env:SECRET}']}", "name: ${out}"):
            file.write_text(text)
            for read in (config.load, config.load_resolved):
                with pytest.raises(RecipeError, match=r"holds \$\{...\}") as caught:
                    read(file)
                assert "hunter2" not in str(caught.value)
    strange.write_text("")
    with pytest.raises(RecipeError, match="write the value itself"):
        config.load(strange)


def test_names_fit_into_a_file_system(recipe_file: Path) -> None:
    patterns = [f"model.pattern=[{', '.join(['gla'] * 100)}, {last}]" for last in ("softmax", "kda")]
    names = [config.load(recipe_file, [pattern]).name for pattern in patterns]
    assert names[0].startswith("mine-pattern-gla-gla-") and len(set(names)) == 2
    assert all(len(name.encode()) <= 240 for name in names)
    assert all(len(config.file_name("é" * n).encode()) <= 240 for n in range(118, 124))
    assert config.file_name("a" * 240) == "a" * 240
    quickstart = ROOT / "recipes/quickstart.yaml"
    config.validate(config.load(quickstart, [patterns[0], "model.depth=101"]), 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {files: *.txt}", ["mine.yaml: not valid YAML: ", "in line 1, column 1", "between quotes"]),
        ("wandb:\n  project: a: b", ["mine.yaml: not valid YAML: ", "in line 2, column 13"]),
        ("model: {depth: 4}\nmodel: {dim: 4}", ["not valid YAML: model again in line 2"]),
        ("? [a]\n: 3", ["not valid YAML: a key that is no word"]),
        ("a: 1\n---\nb: 2", ["not valid YAML: ", "in line 2"]),
        ("a: \x00", ["not valid YAML: "]),
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
    assert "\n" not in str(caught.value)


def test_a_link_needs_latency_and_bandwidth(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match="parallel.link.bandwidth is missing"):
        config.load(recipe_file, ["parallel.link.latency=5"])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: cannot be read .* such as recipes/quickstart\.yaml"):
        config.load(tmp_path / "gone.yaml")


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
    recipe = config.load(ROOT / "recipes/quickstart.yaml", [override, *more])
    with pytest.raises(RecipeError) as caught:
        config.validate(recipe, world)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_recipes_that_come_along_are_possible() -> None:
    recipe = config.load(ROOT / "recipes/quickstart.yaml")
    assert recipe.model.depth == 8
    for world in (1, 2, 4):
        config.validate(recipe, world)


def test_the_largest_seed_is_one_that_torch_takes() -> None:
    config.validate(config.load(ROOT / "recipes/quickstart.yaml", [f"train.seed={config.SEEDS}"]), 1)
    torch.Generator().manual_seed(config.SEEDS * 1_000_003 + 100_000)  # what recipes/train.py makes of it on a rank


@pytest.mark.parametrize("text", ["", "two", "0", "-1", "1.0", "1e9", "9" * 30])
def test_a_number_of_processes_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(RecipeError, match=f"the environment has WORLD_SIZE='{text}', which must be a number of proc"):
        config.processes()
    monkeypatch.delenv("WORLD_SIZE")
    assert config.processes() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "12")
    assert config.processes("LOCAL_WORLD_SIZE") == 12


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
    moved = replace(old, data=config.DataConfig(files="there", validation="v", test="t"))
    assert config.difference(old, moved) == [], "whether it is the same text is seen by its fingerprint"
    assert config.difference(old, replace(old, data=config.DataConfig(pack=True))) == ["data.pack (False -> True)"]
    new = replace(old, train=config.TrainConfig(seed=3), model=config.ModelConfig(ratio="1/8"))
    assert config.difference(old, new) == ["model.ratio (1/4 -> 1/8)", "train.seed (0 -> 3)"]
