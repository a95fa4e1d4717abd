"""Text as bytes: the corpus, its split into training and held-out files, and the windows of every step.

The window of a sequence depends on (seed, step, index of the sequence in the step) alone, never on how many ranks share
the work; the step is therefore the whole position in the data, and a resumed run goes on exactly.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import sysconfig
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.config import DataConfig, RecipeError

# Left out of the standard library: not part of it, or not installed everywhere.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT = 20  # one file in so many is for validation


@dataclass(frozen=True, kw_only=True)
class Text:
    """Files one after the other: their bytes (uint8, one dim), and where each of them starts."""

    content: torch.Tensor
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.content)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Sequences of equal length from a text. `cu_seqlens` are the bounds of the documents, laid end to end: every
    sequence begins one, and every file in it."""

    tokens: torch.Tensor  # LongTensor [sequences, length]
    cu_seqlens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Two texts from different files."""

    train: Text
    validation: Text
    files: int
    fingerprint: str  # SHA-256 over both
    unigram_bits: float  # entropy of the validation bytes by their own frequencies, in bits per byte


def read_corpus(config: DataConfig) -> Corpus:
    """Reads the corpus that ``config`` names.

    The files are ordered by the hash of their names below the folder that holds them all, so that a text is split alike
    wherever it lies; the first twentieth, at least one, is held out for validation.
    Raises RecipeError if there are fewer than two files, or too few bytes for one sequence.
    """
    files = _standard_library() if config.files is None else _matches(config.files)
    by_hash = sorted(files, key=lambda name: (hashlib.sha256(name.encode()).digest(), name))
    held_out = set(by_hash[: max(1, len(by_hash) // HELD_OUT)])
    parts = [[name for name in sorted(files) if (name in held_out) == held] for held in (False, True)]
    train, validation = (_joined([files[name].read_bytes() for name in part]) for part in parts)
    for split, text in (("training", train), ("validation", validation)):
        if len(text) < config.length:
            raise RecipeError(
                f"data.length={config.length} is longer than the {len(text)} bytes of the {split} files; "
                "lower it, or name more text with data.files"
            )
    digests = [hashlib.sha256(text.content.numpy().data).digest() for text in (train, validation)]
    return Corpus(
        train=train,
        validation=validation,
        files=len(files),
        fingerprint=hashlib.sha256(digests[0] + digests[1]).hexdigest(),
        unigram_bits=unigram_bits(validation.content),
    )


def _joined(files: list[bytes]) -> Text:
    starts = itertools.accumulate((len(file) for file in files[:-1]), initial=0)
    content = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    return Text(content=content, starts=tuple(sorted(set(starts))))


def unigram_bits(content: torch.Tensor) -> float:
    """H = -sum_b p_b log2 p_b over the byte values b of uint8 ``content``, in bits per byte."""
    counts = torch.bincount(content.long(), minlength=256).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log2()).sum())


def training_windows(corpus: Corpus, length: int, seed: int, step: int, indices: Iterable[int]) -> Windows:
    """Some sequences of a step.

    ``indices`` count the sequences of the whole step, over all ranks and accumulation.
    """
    room = len(corpus.train) - length + 1
    starts = (hashlib.blake2b(f"{seed}/{step}/{i}".encode(), digest_size=8).digest() for i in indices)
    return _windows(corpus.train, length, (int.from_bytes(start, "big") % room for start in starts))


def validation_windows(corpus: Corpus, length: int, sequences: int, indices: Iterable[int]) -> Windows:
    """Some of ``sequences`` windows spread evenly over the held-out bytes."""
    last = len(corpus.validation) - length
    return _windows(corpus.validation, length, (i * last // max(1, sequences - 1) for i in indices))


def nats_to_bits(nats: float) -> float:
    """Bits per byte of a loss in nats per byte."""
    return nats / math.log(2)


def _windows(text: Text, length: int, starts: Iterable[int]) -> Windows:
    rows, bounds = [], [0]
    for row, start in enumerate(starts):
        rows.append(text.content[start : start + length])
        inside = text.starts[bisect_right(text.starts, start) : bisect_left(text.starts, start + length)]
        bounds += [*(row * length + file - start for file in inside), (row + 1) * length]
    return Windows(tokens=torch.stack(rows).long(), cu_seqlens=tuple(bounds))


def _standard_library() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in root.rglob("*.py") if path.is_file())
    names = {path.relative_to(root): path for path in files}
    return {name.as_posix(): path for name, path in names.items() if not SKIPPED_FOLDERS.intersection(name.parts)}


def _matches(pattern: str) -> dict[str, Path]:
    names = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if len(names) < 2:
        raise RecipeError(
            f"data.files={pattern!r} matches {len(names)} files, but at least two are needed (one is held out for "
            "validation); give a glob such as 'texts/**/*.txt', relative to the working folder, or null"
        )
    folder = Path(os.path.commonpath([Path(name).parent for name in names]))
    return {Path(name).relative_to(folder).as_posix(): Path(name) for name in names}
