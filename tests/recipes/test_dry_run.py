"""The look before a launch: one line for a mistake, otherwise the resolved recipe and what it comes to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from layers.config import model_facts, parameters_by_kind
from recipes import train
from recipes.load import dump, load_recipe

QUICKSTART = "recipes/quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle.ratio=1/8", "unknown key 'modle.ratio'; the nearest is 'model.ratio'"),
        ("model.ratio=1/3", "does not tile a depth of 8"),
        ("parallel.sp=2", "make 2 processes, but 3 were started"),
        ("data.files=nowhere/*.txt", "data.files='nowhere/*.txt' names 0 files"),
    ],
)
def test_a_mistake_is_one_line(
    override: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main([QUICKSTART, "--dry-run", override]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and words in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("words", ["--dry-run R S", "R --dry-run S", "R S --dry-run"])
def test_a_sound_recipe_is_printed_with_its_facts(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = {"R": QUICKSTART, "S": "model.ratio=1/8"}
    assert train.main([asked.get(word, word) for word in words.split()]) == 0
    said, recipe = capsys.readouterr().out, load_recipe(QUICKSTART, ["model.ratio=1/8"])
    assert said.startswith(dump(recipe)) and said.endswith(" are state\n")
    lines = said.removeprefix(dump(recipe)).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["#", word] for word in ("model", "data", "training", "parameters", "cost")
    ]
    assert (
        f"LLLLLLLN (gla, gla, gla, gla, gla, gla, gla, softmax), {model_facts(recipe.model).parameters:,} " in lines[0]
    )
    (tmp_path / "said.yaml").write_text(said)
    assert load_recipe(tmp_path / "said.yaml") == recipe, "what is printed is a recipe file"


def test_a_model_that_fits_no_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.vocab=150000", "model.dim=4096", "model.depth=64", "model.pattern=3*gla softmax", "model.heads=32"]
    words += ["model.moe={experts: 256, active: 8, dim: 2048}", "data.length=4096"]
    assert train.main([QUICKSTART, "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    recipe = load_recipe(QUICKSTART, words)
    facts = model_facts(recipe.model)
    kinds = parameters_by_kind(recipe.model)
    assert facts.parameters > 4e11 and sum(kinds.values()) == facts.parameters
    (line,) = [line for line in said.splitlines() if line.startswith("# parameters")]
    assert line == (
        f"# parameters embedding 614,400,000, gla {kinds['gla']:,}, softmax {kinds['softmax']:,}, "
        f"experts {kinds['experts']:,}, norms {kinds['norms']:,}, head 614,400,000; "
        f"{facts.active_parameters:,} active for a token"
    )
    gla, keys = 48 * (32 * 64 * 128), 16 * 2 * 4096  # numbers of states in all, and of keys and values for each token
    assert (
        f"{4 * (gla + keys * 4096):,} bytes of decoding cache after 4096 tokens, of which {4 * gla:,} are state" in said
    )
    assert said.endswith(
        "# note       model.vocab=150000 must be 256: the data are bytes, so this recipe does not train here\n"
    )
    assert train.main([QUICKSTART, *words]) == 2
    assert capsys.readouterr().err == "error: model.vocab=150000 must be 256: the data are bytes\n"


def test_a_dry_run_takes_no_module_of_checkpoints() -> None:
    """They take a second to import, a third of the look."""
    command = "import sys, recipes.train; sys.exit('torch.distributed.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "the following arguments are required: RECIPE"),
        (["train.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["--dry-run"], "the following arguments are required: RECIPE"),
        (["train.yaml", "--dry-run=yes"], "argument --dry-run: ignored explicit argument 'yes'"),
    ],
)
def test_a_wrong_call_is_one_line(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(words)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err == f"python -m recipes.train: error: {error}\n"


def test_help_shows_the_call(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert not ended.value.code and "python -m recipes.train RECIPE [key=value ...]" in said and "--dry-run" in said
