"""Split files into bytes for training, for validation and for test.

The standard library holds out one file in twenty, by hash. For other text, the first rule that applies decides, for
validation and for test separately. A run neither trains nor validates on the test bytes.

1. `data.validation` and `data.test` name files.
2. A file's name contains train, valid, validation, val, dev or test as a whole word. Without one, the nearest folder
   decides, up to the folder that holds all files.
3. Each part takes a twentieth of the bytes. The order of files is that of the hashes of their names below the common
   folder, so the location of the text does not matter. The last files are held out; a file that is too large is cut.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from recipes.config import RecipeError

# Skip these folders: they are no part of the standard library, or some machines lack them.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT = 20  # hold out one file, or one byte, in twenty
PARTS = {"train": "train", "valid": "validation", "validation": "validation", "val": "validation", "dev": "validation",
         "test": "test"}  # fmt: skip
REACH = 1 << 16  # move a cut by at most this many bytes, to the bound of a document or a line


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Name the bytes start to end of a file; `name` is its path below the folder that holds all files."""

    name: str
    path: Path
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class Split:
    """Hold the pieces of each part, in order of their names, and the rule of the split in a few words."""

    train: tuple[Piece, ...]
    validation: tuple[Piece, ...]
    test: tuple[Piece, ...]
    files: int
    rule: str


def split_files(files: str | None, validation: str | None = None, test: str | None = None) -> Split:
    """Split the text that `data.files`, `data.validation` and `data.test` name.

    Raise RecipeError if a key names no file or no bytes, and if nothing is left to train on.
    """
    if files is None:
        if validation or test:
            raise RecipeError("data.validation and data.test need data.files; the standard library has its own split")
        return _standard_library()
    named = {
        part: _found(f"data.{part}", pattern)
        for part, pattern in (("validation", validation), ("test", test))
        if pattern is not None
    }
    taken: dict[str, str] = {}
    for part, pieces in named.items():
        for path in (os.path.realpath(piece.path) for piece in pieces):
            if taken.setdefault(path, part) != part:
                raise RecipeError(f"data.validation and data.test both name {path!r}; give it to one of them")
    rest = [piece for piece in _found("data.files", files) if os.path.realpath(piece.path) not in taken]
    by_name: dict[str, list[Piece]] = {"train": [], "validation": [], "test": []}
    for piece in rest:
        by_name[_part_by_name(piece.name) or "train"].append(piece)
    train = by_name.pop("train")
    if not train:
        raise RecipeError(
            f"data.files={files!r} leaves no text to train on: by name or key all of its files are for validation or "
            "test; name more text, or let data.validation and data.test say which files are which"
        )
    held = {part: named.get(part) or by_name[part] for part in by_name}
    unused = [piece for part in named for piece in by_name[part]]  # a key overrides the names of these files
    shares = [] if held["validation"] else [part for part in ("test", "validation") if not held[part]]
    train.sort(key=_hash_and_name)
    due = sum(map(len, train)) // HELD_OUT
    for part in shares:
        train, held[part] = _cut(train, due)
    rules = [f"data.{part}" for part in named] + ["name"] * any(by_name.values()) + ["shares of bytes"] * bool(shares)
    neither = sum(map(len, [*held["test"], *unused]))
    return Split(
        train=_in_order(train),
        validation=_in_order(held["validation"]),
        test=_in_order(held["test"]),
        files=len({piece.path for piece in [*rest, *held["validation"], *held["test"]]}),
        rule=f"by {' and '.join(rules)}" + f", {neither:,} bytes for neither" * bool(neither),
    )


def _standard_library() -> Split:
    root = Path(sysconfig.get_path("stdlib"))
    library = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts))
    pieces = sorted(_pieces([path for path in library if path.is_file()], root), key=_hash_and_name)
    held_out = max(1, len(pieces) // HELD_OUT)
    return Split(
        train=_in_order(pieces[held_out:]),
        validation=_in_order(pieces[:held_out]),
        test=(),
        files=len(pieces),
        rule=f"one in {HELD_OUT}, by hash",
    )


def _found(key: str, pattern: str) -> list[Piece]:
    """Find the files of a path or a glob, or all files below a folder; leave out empty ones."""
    wildcard = f"{glob.escape(pattern)}/**" if os.path.isdir(pattern) else pattern
    names = [pattern] if os.path.isfile(pattern) else glob.glob(wildcard, recursive=True)
    paths = [Path(name) for name in sorted(names) if os.path.isfile(name)]
    pieces = _pieces(paths, Path(os.path.commonpath([path.parent for path in paths]))) if paths else []
    if not any(map(len, pieces)):
        raise RecipeError(
            f"{key}={pattern!r} names {len(pieces)} files{' without a byte' * bool(pieces)}; give a file, a folder "
            "or a glob such as 'texts/**/*.txt', relative to the working folder"
        )
    return [piece for piece in pieces if len(piece)]


def _pieces(paths: Sequence[Path], folder: Path) -> list[Piece]:
    return [Piece(name=os.path.relpath(path, folder), path=path, start=0, end=path.stat().st_size) for path in paths]


def _part_by_name(name: str) -> str | None:
    """Return the part that a file's own name or its nearest folder's contains; prefer test, then validation."""
    path = PurePosixPath(name)
    for level in (path, *path.parents):
        parts = {PARTS.get(word) for word in re.findall(r"[^\W\d_]+", level.name.lower())}
        for part in ("test", "validation", "train"):
            if part in parts:
                return part
    return None


def _cut(pieces: Sequence[Piece], due: int) -> tuple[list[Piece], list[Piece]]:
    """Hold out about ``due`` bytes from the end; cut a piece that exceeds the missing bytes by half of ``due``."""
    rest, held, missing = list(pieces), [], due
    while missing > due // 2 or (rest and len(rest[-1]) <= 2 * missing):
        last = rest.pop()
        if len(last) - missing > due // 2:
            bound = _bound(last, last.end - missing, min(due // 2, REACH))
            rest.append(replace(last, end=bound))
            last = replace(last, start=bound)
        held.append(last)
        missing -= len(last)
    return rest, held


def _bound(piece: Piece, at: int, reach: int) -> int:
    """Find the nearest start of a document, which follows a blank line; else of a line; else of a UTF-8 character."""
    first = max(piece.start + 1, at - reach)
    with piece.path.open("rb") as file:
        file.seek(first)
        text = file.read(min(piece.end - 1, at + reach) - first)
    for pattern in (rb"\n[ \t\r]*\n", rb"\n", rb"(?=[\x00-\x7f\xc0-\xff])"):
        if bounds := [first + match.end() for match in re.finditer(pattern, text)]:
            return min(bounds, key=lambda bound: abs(bound - at))
    return at


def _in_order(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    return tuple(sorted(pieces, key=lambda piece: (piece.name, piece.start)))


def _hash_and_name(piece: Piece) -> tuple[bytes, str]:
    return hashlib.sha256(piece.name.encode(errors="surrogateescape")).digest(), piece.name
