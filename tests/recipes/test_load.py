"""Reading a recipe: what wins over what, what text means, and errors that name the key and the nearest one."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import config
from recipes.config import Recipe, RecipeError
from recipes.load import dump, file_name, load_recipe, load_resolved
from recipes.validate import validate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("optim: {lr: 3e-3, clip: 2.0}\ntrain: {steps: 40}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\noptim: {clip: 3.0}\nmodel: {depth: 4}\n")
    return tmp_path / "mine.yaml"


def test_later_wins(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["model.depth=8", "train.seed=1", "train.seed=2"])
    assert recipe.optim.weight_decay == Recipe().optim.weight_decay  # dataclass
    assert (recipe.optim.lr, recipe.train.steps) == (3e-3, 40)  # base
    assert recipe.optim.clip == 3.0  # recipe
    assert (recipe.model.depth, recipe.train.seed) == (8, 2)  # command line, the last


def test_numbers_are_numbers(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["optim.lr=1e-3", "model.ratio=0", "optim.betas=[0.8,0.99]", "optim.clip=null"])
    assert recipe.optim.lr == 0.001 and isinstance(recipe.optim.lr, float)
    assert recipe.model.ratio == "0"
    assert (tuple(recipe.optim.betas), recipe.optim.clip) == ((0.8, 0.99), None)


def test_options_of_mixers_and_patterns(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["model.mixers.gla.expand_k=0.5", "model.pattern=[gla,softmax]"])
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
    assert load_recipe(recipe_file, overrides).name == name


def test_the_run_folder_and_the_resolved_recipe(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["out=there", "model.mixers.gla.expand_k=0.5"])
    assert config.run_folder(recipe) == Path("there/mine-expand_k-0.5")
    (tmp_path / "resolved.yaml").write_text(dump(recipe))
    assert load_resolved(tmp_path / "resolved.yaml") == recipe


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
        load_recipe(recipe_file, [override])
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
    typed = load_recipe(recipe_file, [f"{key}={text}" for key in keys])
    optional = [key for key in keys if key in ("data.files", "data.test", "wandb.group")]
    said = config.flat(typed)
    assert [said[key] for key in keys] == [None if text == "~" and key in optional else text for key in keys]
    quoted = text.replace("'", "''")
    recipe_file.write_text(f"name: '{quoted}'\nmodel: {{linear: '{quoted}'}}\ndata: {{files: '{quoted}'}}\n")
    read = load_recipe(recipe_file)
    assert (read.name, read.model.linear, read.data.files) == (text, text, text)
    (tmp_path / "resolved.yaml").write_text(dump(read))
    assert load_resolved(tmp_path / "resolved.yaml") == read


@pytest.mark.parametrize("text", ["0010", "1_000", "12e4567", "3:1", "true", "on", ".5", "2026-11-28", "null"])
def test_text_of_a_file_needs_no_quotes(recipe_file: Path, text: str) -> None:
    recipe_file.write_text(f"name: {text}\nmodel: {{ratio: {text}}}\ndata:\n  files: {text}\n")
    read = load_recipe(recipe_file)
    assert (read.name, read.model.ratio, read.data.files) == (text, text, None if text == "null" else text)


def test_quotes_hold_text(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file, ['data.files="*.txt"', "wandb.group='null'", "train.steps='08'", "data.test=null"]
    )
    assert (recipe.data.files, recipe.wandb.group, recipe.train.steps, recipe.data.test) == ("*.txt", "null", 8, None)


def test_numbers_are_decimal(recipe_file: Path, tmp_path: Path) -> None:
    """YAML 1.1 reads 0010 as 8 and 1:30 as 90."""
    asked = ["train.steps=0010", "train.seed=1_000", "optim.lr=1e-3", "optim.betas=[0.8, .99]", "train.threads=null"]
    recipe = load_recipe(recipe_file, asked)
    assert (recipe.train.steps, recipe.train.seed, recipe.optim.lr, recipe.train.threads) == (10, 1000, 1e-3, None)
    assert tuple(recipe.optim.betas) == (0.8, 0.99)
    recipe_file.write_text("train: {steps: 0010, seed: 1_000}\noptim: {lr: 1e-3}\n")
    recipe = load_recipe(recipe_file)
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
    typed = load_recipe(recipe_file, [f"model.pattern={text}"]).model.pattern
    assert typed == value and type(typed) is type(value)
    recipe_file.write_text(f"model: {{pattern: {text}}}\n")
    assert load_recipe(recipe_file).model.pattern == value


def test_options_of_mixers_have_the_types_of_their_mixer(recipe_file: Path) -> None:
    options = ["hgrn2.lower_bound=0010", "sliding_window.window=0100", "gla.expand_k=1", "linear.normalize=no"]
    typed = load_recipe(recipe_file, [f"model.mixers.{option}" for option in options]).model.mixers
    recipe_file.write_text(
        "model: {mixers: {hgrn2: {lower_bound: 0010}, sliding_window: {window: 0100}, gla: {expand_k: 1}, "
        "linear: {normalize: no}}}"
    )
    assert (
        typed
        == load_recipe(recipe_file).model.mixers
        == {
            "hgrn2": {"lower_bound": "0010"},
            "sliding_window": {"window": 100},
            "gla": {"expand_k": 1.0},
            "linear": {"normalize": False},
        }
    )
    wrong = load_recipe(ROOT / "recipes/quickstart.yaml", ["model.mixers.gla.expand_k=1:3"])
    with pytest.raises(RecipeError, match="option 'expand_k' of mixer 'gla' is '1:3', a str; it must be a float"):
        validate(wrong, 1)


def test_secrets_of_the_environment_stay_there(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    strange = tmp_path / "${oc.env:SECRET}.yaml"
    for file in (recipe_file, strange):
        for text in ("wandb: {group: '${oc.env:SECRET}'}", "model: {pattern: ['${oc.env:SECRET}']}", "name: ${out}"):
            file.write_text(text)
            for read in (load_recipe, load_resolved):
                with pytest.raises(RecipeError, match=r"holds \$\{...\}") as caught:
                    read(file)
                assert "hunter2" not in str(caught.value)
    strange.write_text("")
    with pytest.raises(RecipeError, match="write the value itself"):
        load_recipe(strange)


def test_names_fit_into_a_file_system(recipe_file: Path) -> None:
    patterns = [f"model.pattern=[{', '.join(['gla'] * 100)}, {last}]" for last in ("softmax", "kda")]
    names = [load_recipe(recipe_file, [pattern]).name for pattern in patterns]
    assert names[0].startswith("mine-pattern-gla-gla-") and len(set(names)) == 2
    assert all(len(name.encode()) <= 240 for name in names)
    assert all(len(file_name("é" * n).encode()) <= 240 for n in range(118, 124))
    assert file_name("a" * 240) == "a" * 240
    quickstart = ROOT / "recipes/quickstart.yaml"
    validate(load_recipe(quickstart, [patterns[0], "model.depth=101"]), 1)


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
        load_recipe(recipe_file)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_written_recipe_begins_with_its_format(recipe_file: Path) -> None:
    """A missing number is read as 1: the first runs name none."""
    recipe = load_recipe(recipe_file)
    text = dump(recipe)
    assert text.startswith("format: 1\nname: ")
    for written in (text, text.removeprefix("format: 1\n")):
        recipe_file.write_text(written)
        assert load_resolved(recipe_file) == load_recipe(recipe_file) == recipe


@pytest.mark.parametrize("found", ["2", "0", "10", "1.0", "", "null", "[1]", "a: 1", "'1\n\n2'", "${out}"])
def test_another_format_is_refused_in_one_line(recipe_file: Path, found: str) -> None:
    """In a user's recipe, in its base and in a run folder."""
    above = recipe_file.with_name("above.yaml")
    above.write_text("format: 1\nbase: mine.yaml\n")
    assert load_recipe(above).model.depth == 4
    recipe_file.write_text(f"format: {found}\nmodel: {{a_new_key: 4}}\n".replace("a: 1", "{a: 1}"))
    for read, path in ((load_recipe, recipe_file), (load_recipe, above), (load_resolved, recipe_file)):
        with pytest.raises(RecipeError) as caught:
            read(path)
        said = str(caught.value)
        assert said.startswith(f"{recipe_file} is of format ") and "this version reads format 1;" in said
        assert "\n" not in said and (found != "2" or "is of format '2', and" in said)


def test_a_link_needs_latency_and_bandwidth(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match="parallel.link.bandwidth is missing"):
        load_recipe(recipe_file, ["parallel.link.latency=5"])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: cannot be read .* such as recipes/quickstart\.yaml"):
        load_recipe(tmp_path / "gone.yaml")


def test_a_run_folder_that_names_no_format_is_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a later version reads it, which takes a user's own file without one for its own."""
    path = tmp_path / "recipe.yaml"
    path.write_text("train:\n  steps: 3\n")
    assert load_resolved(path).train.steps == 3
    monkeypatch.setattr("recipes.config.FORMAT", 2)
    with pytest.raises(RecipeError, match="is of format '1', and this version reads format 2"):
        load_resolved(path)
