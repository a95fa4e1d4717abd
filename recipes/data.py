"""Read text as bytes: the corpus, loaded once into memory, and the windows of every step.

The window of a sequence depends only on (seed, step, index of the sequence in the step), never on the number of ranks.
The step is therefore the whole position in the data, and a resumed run continues exactly.
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
    """Hold the bytes of files, or of pieces of them, one after the other (uint8, one dim), and the start of each."""

    content: torch.Tensor
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.content)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Hold sequences of equal length from a text.

    `cu_seqlens` are the bounds of the documents, laid end to end. Every sequence begins a document, and so does every
    file in it.
    """

    tokens: torch.Tensor  # LongTensor [sequences, length]
    cu_seqlens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Hold the two texts of a run, which share no byte of a file."""

    train: Text
    validation: Text
    files: int
    rule: str  # of the split, in a few words
    fingerprint: str  # SHA-256 of both texts
    unigram_bits: float  # entropy of the validation bytes by their own frequencies, in bits per byte


def read_corpus(config: DataConfig) -> Corpus:
    """Read the corpus that ``config`` names; recipes/split.py decides which bytes are held out.

    Raise RecipeError for files that cannot be read, for too few bytes for one sequence, and for a validation text of
    equal bytes. Such a text has entropy 0, so a loss on it would mean nothing.
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
    if config.files is not None:  # data.pack makes the weights depend on the starts of files
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
    """Read the pieces into one tensor, each directly to its offset, so that memory never holds a second copy."""
    starts = [0, *itertools.accumulate(map(len, pieces))]
    content = torch.empty(starts.pop(), dtype=torch.uint8)
    memory = content.numpy().data
    for piece, start in zip(pieces, starts, strict=True):
        buffer = memory[start : start + len(piece)]
        with piece.path.open("rb", buffering=0) as file:
            file.seek(piece.start)
            while len(buffer):
                if not (count := file.readinto(buffer)):
                    raise OSError(f"{piece.path} has become shorter while it was read")
                buffer = buffer[count:]
    return Text(content=content, starts=tuple(sorted(set(starts))))


def unigram_bits(content: torch.Tensor) -> float:
    """Compute the entropy H = -sum_b p_b log2 p_b of the byte values b of uint8 ``content``, in bits per byte."""
    counts = torch.zeros(256, dtype=torch.float64)
    for part in content.split(1 << 20):  # bincount needs eight bytes of memory per byte
        counts += torch.bincount(part, minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float((p * (1 / p).log2()).sum())


def training_windows(corpus: Corpus, length: int, seed: int, step: int, indices: Iterable[int]) -> Windows:
    """Return some sequences of a step.

    ``indices`` count the sequences of the whole step, over all ranks and accumulation.
    """
    room = len(corpus.train) - length + 1
    starts = (hashlib.blake2b(f"{seed}/{step}/{i}".encode(), digest_size=8).digest() for i in indices)
    return _windows(corpus.train, length, (int.from_bytes(start, "big") % room for start in starts))


def validation_windows(corpus: Corpus, length: int, sequences: int, indices: Iterable[int]) -> Windows:
    """Return some of ``sequences`` windows that are spread evenly over the held-out bytes."""
    last = len(corpus.validation) - length
    return _windows(corpus.validation, length, (i * last // max(1, sequences - 1) for i in indices))


def nats_to_bits(nats: float) -> float:
    """Convert a loss in nats per byte to bits per byte."""
    return nats / math.log(2)


def _windows(text: Text, length: int, starts: Iterable[int]) -> Windows:
    rows, bounds = [], [0]
    for row, start in enumerate(starts):
        rows.append(text.content[start : start + length])
        inside = text.starts[bisect_right(text.starts, start) : bisect_left(text.starts, start + length)]
        bounds += [*(row * length + file - start for file in inside), (row + 1) * length]
    return Windows(tokens=torch.stack(rows).long(), cu_seqlens=tuple(bounds))
