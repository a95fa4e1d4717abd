"""The check before a launch: one line for a mistake, the resolved recipe otherwise."""

from __future__ import annotations

import pytest

from recipes import check
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
    assert check.main([QUICKSTART, override]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and words in printed.err
    assert printed.err.count("\n") == 1


def test_a_sound_recipe_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([QUICKSTART, "model.ratio=1/8"]) == 0
    assert capsys.readouterr().out == dump(load_recipe(QUICKSTART, ["model.ratio=1/8"]))
