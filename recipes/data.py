"""Text as bytes: the corpus, read once into memory, and the windows of every step.

The window of a sequence depends on (seed, step, index of the sequence in the step) alone, never on how many ranks share
the work; the step is therefore the whole position in the data, and a resumed run goes on exactly.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from recipes.config import DataConfig, RecipeError
from recipes.split import Piece, split_files


@dataclass(frozen=True, kw_only=True)
class Text:
    """Files, or pieces of them, one after the other: their bytes (uint8, one dim), and where each of them starts."""

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
    """Two texts that share no byte of a file."""

    train: Text
    validation: Text
    files: int
    rule: str  # by which they were split, in a few words
    fingerprint: str  # SHA-256 over both
    unigram_bits: float  # entropy of the validation bytes by their own frequencies, in bits per byte


def read_corpus(config: DataConfig) -> Corpus:
    """Reads the corpus that ``config`` names; recipes/split.py says which bytes are held out.

    Raises RecipeError for files that cannot be read, too few bytes for one sequence, or a validation text of which
    all bytes are equal: with an entropy of 0 nothing can be said about a loss.
    """
    try:
        split = split_files(config.files, config.validation, config.test)
        for part, pieces in (("training", split.train), ("validation", split.validation)):
            size = sum(map(len, pieces))
            if size < config.length:
                raise RecipeError(
                    f"data.length={config.length} is longer than the {size} bytes of the {part} text ({split.rule}); "
                    "lower it, name more text with data.files, or name files with data.validation"
                )
        train, validation = _read(split.train), _read(split.validation)
    except OSError as error:
        raise RecipeError(f"data.files: cannot be read ({error}); name files that can") from error
    digests = [hashlib.sha256(text.content.numpy().data).digest() for text in (train, validation)]
    if config.files is not None:  # where files begin is seen by a run with data.pack
        digests += [repr(text.starts).encode() for text in (train, validation)]
    unigram = unigram_bits(validation.content)
    if not unigram:
        raise RecipeError(
            f"the validation text ({split.rule}) is one byte, {int(validation.content[0])}, again and again; "
            "name other text with data.files or data.validation"
        )
    return Corpus(
        train=train,
        validation=validation,
        files=split.files,
        rule=split.rule,
        fingerprint=hashlib.sha256(b"".join(digests)).hexdigest(),
        unigram_bits=unigram,
    )


def _read(pieces: Sequence[Piece]) -> Text:
    """The pieces, each read into its place, so that no second copy is ever in memory."""
    starts = [0, *itertools.accumulate(map(len, pieces))]
    content = torch.empty(starts.pop(), dtype=torch.uint8)
    memory = content.numpy().data
    for piece, start in zip(pieces, starts, strict=True):
        place = memory[start : start + len(piece)]
        with piece.path.open("rb", buffering=0) as file:
            file.seek(piece.start)
            while len(place):
                if not (count := file.readinto(place)):
                    raise OSError(f"{piece.path} has become shorter while it was read")
                place = place[count:]
    return Text(content=content, starts=tuple(sorted(set(starts))))


def unigram_bits(content: torch.Tensor) -> float:
    """H = -sum_b p_b log2 p_b over the byte values b of uint8 ``content``, in bits per byte."""
    counts = torch.zeros(256, dtype=torch.float64)
    for part in content.split(1 << 20):  # bincount takes eight bytes for one
        counts += torch.bincount(part, minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float((p * (1 / p).log2()).sum())


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
