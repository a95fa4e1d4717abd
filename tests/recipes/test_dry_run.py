"""The look before a launch: one line for a mistake, otherwise the resolved recipe and what it comes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from layers.config import model_facts
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
    assert said.startswith(dump(recipe)) and said.endswith(" tokens\n")
    lines = said.removeprefix(dump(recipe)).splitlines()
    assert [line.split()[:2] for line in lines] == [["#", word] for word in ("model", "data", "training", "cost")]
    assert (
        f"LLLLLLLN (gla, gla, gla, gla, gla, gla, gla, softmax), {model_facts(recipe.model).parameters:,} " in lines[0]
    )
    (tmp_path / "said.yaml").write_text(said)
    assert load_recipe(tmp_path / "said.yaml") == recipe, "what is printed is a recipe file"


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
