"""The form of docstrings and comments, as far as a program can judge it: first words, and the length of sentences."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["hybrid_sp", "layers", "recipes", "analysis"]  # those that keep to it
LONGEST = 25  # words in a sentence
# A docstring begins with "The" or with one of these verbs; whoever needs another adds it.
VERBS = set((ROOT / "tests/support/verbs.txt").read_text().split())


def prose(text: str) -> str:
    """The running text of a docstring: without what is indented, and without lists whose columns are set by spaces."""
    lines = text.strip().splitlines()
    body = lines[:1] + [line.removeprefix(" " * indent(lines[1:])) for line in lines[1:]]
    return "\n".join("" if line.startswith(" ") or re.search(r"\S {2,}\S", line) else line for line in body)


def indent(lines: list[str]) -> int:
    return min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)


def long_sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.:!?])\s+", " ".join(paragraph.split())):
            if len(re.findall(r"[A-Za-z]{2,}", re.sub(r"`[^`]*`|\([^)]*\)|\[[^\]]*\]", "", sentence))) > LONGEST:
                yield sentence


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield node.body[0].lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments of consecutive lines as one."""
    held: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("# ")
            if held and held[-1][0] == line - 1 and token.line.lstrip().startswith("#"):
                held[-1] = line, f"{held[-1][1]} {text}"
            else:
                held.append((line, text))
    yield from held


def faults(path: Path) -> Iterator[str]:
    source = path.read_text()
    for line, text in docstrings(source):
        first = re.match(r"[A-Za-z-]*", text.lstrip("`*"))
        if first is None or first.group() not in VERBS | {"The"}:
            yield f"{path.relative_to(ROOT)}:{line} begins with {text.split()[0]!r}, not with a verb or The"
        for sentence in long_sentences(prose(text)):
            yield f"{path.relative_to(ROOT)}:{line} has a sentence of more than {LONGEST} words: {sentence}"
    for line, text in comments(source):
        for sentence in long_sentences(text):
            yield f"{path.relative_to(ROOT)}:{line} has a comment of more than {LONGEST} words: {sentence}"


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_begin_with_a_verb_and_sentences_are_short(room: str) -> None:
    found = [fault for path in sorted({*(ROOT / room).rglob("*.py")}) for fault in faults(path)]
    assert not found, "\n".join(found)


def test_the_form_is_seen() -> None:
    long = " ".join(["word"] * 26)
    for text, count in (
        ("The sum.", 0),
        ("What is summed.", 1),
        (f"Return {long}.", 1),
        (f"Sum all.\n\n    All.\n\n        {long}", 0),
    ):
        first = text.split()[0] not in VERBS | {"The"}
        assert first + len(list(long_sentences(prose(text)))) == count, text
