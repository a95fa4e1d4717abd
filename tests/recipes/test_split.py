"""Which bytes are held out: by keys, by names, by shares; and what stays of the text of the standard library."""

from __future__ import annotations

import os
import sysconfig
from itertools import combinations
from pathlib import Path

import pytest

from recipes.config import RecipeError
from recipes.split import Piece, Split, split_files


def write(folder: Path, sizes: dict[str, int]) -> str:
    """Files of lines of 10 bytes."""
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((b"123456789\n" * (size // 10 + 1))[:size])
    return str(folder)


def names(pieces: tuple[Piece, ...]) -> list[str]:
    return [piece.name for piece in pieces]


def sizes(split: Split) -> list[int]:
    return [sum(map(len, pieces)) for pieces in (split.train, split.validation, split.test)]


def spans(split: Split) -> set[tuple[str, str, int, int]]:
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    return {(part, piece.name, piece.start, piece.end) for part, pieces in parts.items() for piece in pieces}


def test_names_are_believed(tmp_path: Path) -> None:
    write(tmp_path, {"wiki.train.tokens": 2000, "wiki.valid.tokens": 30, "wiki.test.tokens": 40})
    split = split_files(str(tmp_path / "*.tokens"))
    assert (names(split.train), names(split.validation), names(split.test)) == (
        ["wiki.train.tokens"],
        ["wiki.valid.tokens"],
        ["wiki.test.tokens"],
    )
    assert split.files == 3 and split.rule == "by name, 40 bytes for neither"


SAID = {
    "train": ["train.jsonl", "a-train-00001.txt", "TRAIN.txt", "sub/train/b.txt", "test/train.txt", "corpus.train"],
    "validation": ["val.txt", "valid.txt", "validation.txt", "dev.txt", "dev/a.txt", "x/VAL/a/b.txt", "val2017.txt"],
    "test": ["my-test.txt", "test/a.txt", "wiki.test.tokens", "my_test.txt", "dev-test.txt", "dev/test.txt"],
    "nothing": ["contest.txt", "latest.txt", "value.txt", "developer.txt", "training/a.txt", "attest.txt"],
}


@pytest.mark.parametrize(("part", "name"), [(part, name) for part in SAID for name in SAID[part]])
def test_a_name_is_believed_by_whole_words_and_the_nearest_place(tmp_path: Path, part: str, name: str) -> None:
    """Beside a file for training and one for validation, so that the common folder is the whole."""
    write(tmp_path, {name: 100, "long.txt": 1000, "zz/valid.txt": 50})
    split = split_files(str(tmp_path))
    where = {"train": split.train, "validation": split.validation, "test": split.test}
    found = [one for one, pieces in where.items() if name in names(pieces)]
    assert found == ["train" if part == "nothing" else part]
    assert "zz/valid.txt" in names(split.validation) and "long.txt" in names(split.train)


def test_the_folder_that_holds_all_says_nothing(tmp_path: Path) -> None:
    split = split_files(write(tmp_path / "test/dev", {f"{i}.txt": 1000 for i in range(20)}))
    assert sizes(split) == [18_000, 1000, 1000] and split.rule == "by shares of bytes, 1,000 bytes for neither"


def test_keys_come_before_names(tmp_path: Path) -> None:
    """What the names call validation is then neither trained nor validated on, and what is test never is."""
    write(tmp_path, {"texts/a.txt": 500, "texts/b.txt": 300, "texts/valid.txt": 70, "texts/test.txt": 60, "more/c": 90})
    files, more = str(tmp_path / "texts"), str(tmp_path / "more")
    split = split_files(files, validation=more)
    assert (names(split.train), names(split.validation), names(split.test)) == (["a.txt", "b.txt"], ["c"], ["test.txt"])
    assert split.rule == "by data.validation and name, 130 bytes for neither" and split.files == 5
    split = split_files(files, validation=str(tmp_path / "texts/b.*"), test=str(tmp_path / "texts/valid.txt"))
    assert (names(split.train), names(split.validation), names(split.test)) == (["a.txt"], ["b.txt"], ["valid.txt"])
    split = split_files(files, test=str(tmp_path / "more/c"))
    assert (names(split.train), names(split.validation), names(split.test)) == (
        ["a.txt", "b.txt"],
        ["valid.txt"],
        ["c"],
    )


def test_validation_is_cut_from_training_where_nothing_else_says_it(tmp_path: Path) -> None:
    split = split_files(write(tmp_path, {"train.txt": 20_000, "test.txt": 300}))
    assert sizes(split) == [19_000, 1000, 300] and names(split.test) == ["test.txt"]
    assert split.rule == "by name and shares of bytes, 300 bytes for neither"


def test_one_file_is_cut_at_lines_or_documents(tmp_path: Path) -> None:
    file = tmp_path / "input.txt"
    write(tmp_path, {"input.txt": 20_000})
    split = split_files(str(file))
    assert spans(split) == {
        ("train", "input.txt", 0, 18_000),
        ("validation", "input.txt", 18_000, 19_000),
        ("test", "input.txt", 19_000, 20_000),
    }
    text = bytearray(file.read_bytes())
    text[18_258:18_259] = b"\n"  # an empty line, a quarter of the share away: a document begins behind it
    file.write_bytes(text)
    assert [piece.start for piece in split_files(str(file)).validation] == [18_260]
    file.write_bytes("ä".encode() * 10_001)  # no line at all: never within a character
    assert all(piece.start % 2 == 0 for piece in split_files(str(file)).validation)
    assert min(sizes(split_files(str(file)))) == 1000


@pytest.mark.parametrize(
    "files",
    [
        {f"{i}.txt": 4000 for i in range(30)},
        {f"{i}.txt": 4000 for i in range(4)},
        {f"{i}.txt": 10 + i for i in range(900)},
        {"huge.txt": 1_000_000, **{f"{i}.txt": 100 for i in range(50)}},
        {"a.txt": 3_000_000, "b.txt": 10, "c.txt": 0},
        {f"{i}.txt": 2**i for i in range(18)},
    ],
    ids=["thirty", "four", "many", "one is huge", "one is all", "powers"],
)
def test_shares_are_of_bytes_wherever_the_text_lies(tmp_path: Path, files: dict[str, int]) -> None:
    split = split_files(write(tmp_path / "here", files))
    total = sum(files.values())
    assert sum(sizes(split)) == total
    assert all(abs(size / total - 0.05) <= 0.026 for size in sizes(split)[1:]), sizes(split)
    by_file: dict[str, list[tuple[int, int]]] = {}
    for _, name, start, end in spans(split):
        by_file.setdefault(name, []).append((start, end))
    for pieces in by_file.values():
        assert all(a[1] <= b[0] or b[1] <= a[0] for a, b in combinations(pieces, 2))
    there = split_files(write(tmp_path / "there/test/elsewhere", files))
    assert spans(there) == spans(split) and there.rule == split.rule


def test_a_file_a_folder_and_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a [b]*", {"x/1.txt": 1000, "2.txt": 1000, ".git/config": 50, "3.md": 20})
    assert split_files(folder).files == 3, "a folder is all below it that is not hidden, whatever its name"
    assert split_files(f"{folder}/2.txt").files == 1
    monkeypatch.chdir(tmp_path)
    write(Path("plain"), {"x/1.txt": 1000, "2.txt": 1000, "3.md": 20})
    assert split_files("plain/**/*.txt").files == 2
    assert split_files("plain/[23].*").files == 2


def test_empty_files_are_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.txt": 3000, "b.txt": 0, "c.txt": 0, "valid.txt": 0})
    split = split_files(folder)
    assert split.files == 1 and sizes(split) == [2700, 150, 150]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    bad = os.fsdecode(b"caf\xe9.txt")
    split = split_files(write(tmp_path, {bad: 1000, "b.txt": 1000, "c.txt": 1000}))
    assert split.files == 3 and sum(sizes(split)) == 3000
    assert names(split_files(write(tmp_path / "more", {bad[:4] + "-valid": 10, "a": 90})).validation) == [
        bad[:4] + "-valid"
    ]


def test_what_cannot_be_split_says_what_to_change(tmp_path: Path) -> None:
    folder = write(tmp_path, {"empty/a.txt": 0, "held/test.txt": 30, "held/dev.txt": 30, "texts/a.txt": 50})
    for arguments, words in (
        ((f"{folder}/none*",), r"data.files='.*none\*' names 0 files; give a file, a folder or a glob"),
        ((f"{folder}/empty",), r"data.files='.*empty' names 1 files without a byte"),
        ((f"{folder}/held",), r"data.files='.*held' leaves no text to train on"),
        ((f"{folder}/texts", f"{folder}/texts/a.txt"), "leaves no text to train on"),
        ((f"{folder}/texts", f"{folder}/none"), r"data.validation='.*none' names 0 files"),
        ((f"{folder}/texts", None, f"{folder}/none"), r"data.test='.*none' names 0 files"),
        ((f"{folder}/texts", f"{folder}/held", f"{folder}/held/test.txt"), "both name '.*test.txt'"),
        ((None, f"{folder}/held"), "need data.files"),
    ):
        with pytest.raises(RecipeError, match=words) as caught:
            split_files(*arguments)
        assert "\n" not in str(caught.value)


def test_the_standard_library_keeps_its_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file in twenty by the SHA-256 of its name, whatever the names say: results that are published hang on it."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    write(tmp_path, {f"package/module{i}.py": 10 * i for i in range(41)})
    write(tmp_path, {"valid.py": 10, "site-packages/x.py": 10, "test/y.py": 10, "z.txt": 10, "email/tests/a.py": 10})
    split = split_files(None)
    assert names(split.validation) == ["package/module17.py", "package/module22.py"]
    assert split.files == 42 and split.test == () and sizes(split)[1] == 390
    assert names(split.train) == sorted(set(names(split.train))) and "valid.py" in names(split.train)
    assert split.rule == "one in 20, by hash"
