"""The corpus and its windows: the same on every mesh, held-out files apart, errors that say what to change."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch

from recipes import data
from recipes.config import DataConfig, RecipeError
from recipes.split import Piece, Split
from tests.recipes.conftest import write_texts


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def corpus(pattern: str) -> data.Corpus:
    return data.read_corpus(DataConfig(files=pattern, length=32))


def test_the_split_is_by_file(pattern: str, corpus: data.Corpus) -> None:
    texts = {path.stem: path.read_bytes() for path in sorted(Path(pattern).parent.iterdir())}
    assert bytes(corpus.validation.content.tolist()) == texts.pop("valid")
    assert bytes(corpus.train.content.tolist()) == b"".join(texts.values())
    assert corpus.rule == "by name" and corpus.files == 4


def test_one_file_is_read_in_three_parts(tmp_path: Path) -> None:
    whole = bytes(range(256)) * 80
    (tmp_path / "input.txt").write_bytes(whole)
    corpus = data.read_corpus(DataConfig(files=str(tmp_path / "input.txt"), length=32))
    train, validation = (bytes(text.content.tolist()) for text in (corpus.train, corpus.validation))
    assert whole.startswith(train + validation) and len(train + validation) < len(whole) - 500
    assert corpus.train.starts == (0,) and corpus.files == 1


def test_reading_takes_no_second_copy(tmp_path: Path) -> None:
    """The text lies in torch's memory, which tracemalloc does not see; what Python holds beside it must be little."""
    size = 8 << 20
    (tmp_path / "input.txt").write_bytes(b"123456789\n" * (size // 10))
    tracemalloc.start()
    try:
        data.read_corpus(DataConfig(files=str(tmp_path / "input.txt"), length=32))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 4


def test_a_file_that_shrinks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    pieces = (Piece(name="a", path=tmp_path / "a", start=1, end=9),)
    monkeypatch.setattr(
        data, "split_files", lambda *_: Split(train=pieces, validation=pieces, test=(), files=1, rule="")
    )
    with pytest.raises(RecipeError, match=r"data.files: cannot be read \(.*a has become shorter"):
        data.read_corpus(DataConfig(files="a", length=8))


def test_the_same_text_in_any_place_is_the_same_corpus_and_another_is_not(
    pattern: str, corpus: data.Corpus, tmp_path: Path
) -> None:
    assert data.read_corpus(DataConfig(files=pattern, length=8)).fingerprint == corpus.fingerprint
    for place in range(4):
        moved = write_texts(tmp_path / f"place {place}")
        assert data.read_corpus(DataConfig(files=moved, length=8)).fingerprint == corpus.fingerprint
    other = write_texts(tmp_path / "texts", seed=1)
    assert data.read_corpus(DataConfig(files=other, length=8)).fingerprint != corpus.fingerprint


def test_files_of_equal_bytes_and_other_bounds_are_another_corpus(tmp_path: Path) -> None:
    for place, names in (("a", "12"), ("b", "13")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "valid").write_bytes(b"0123" * 9)
        for name, text in zip(
            names, (b"ab" * 20, b"ab" * 30) if place == "a" else (b"ab" * 30, b"ab" * 20), strict=True
        ):
            (tmp_path / place / name).write_bytes(text)
    a, b = (data.read_corpus(DataConfig(files=str(tmp_path / place), length=8)) for place in "ab")
    assert torch.equal(a.train.content, b.train.content) and a.train.starts != b.train.starts
    assert a.fingerprint != b.fingerprint


def test_the_standard_library_is_a_corpus() -> None:
    corpus = data.read_corpus(DataConfig())
    assert corpus.files > 300 and len(corpus.train) > 5_000_000
    assert 0.01 < len(corpus.validation) / len(corpus.train) < 0.2
    assert 3.5 < corpus.unigram_bits < 5.0


def test_unigram_entropy() -> None:
    assert data.unigram_bits(torch.arange(256, dtype=torch.uint8)) == pytest.approx(8.0)
    assert data.unigram_bits(torch.tensor([1, 1, 2, 2], dtype=torch.uint8)) == pytest.approx(1.0)
    assert str(data.unigram_bits(torch.tensor([7, 7], dtype=torch.uint8))) == "0.0"
    assert data.unigram_bits(torch.arange(256, dtype=torch.uint8).repeat(1 << 13)) == pytest.approx(8.0)


def test_a_window_depends_on_seed_step_and_index_alone(corpus: data.Corpus) -> None:
    whole = data.training_windows(corpus, 32, 0, 5, range(8)).tokens
    assert whole.shape == (8, 32) and whole.dtype == torch.int64
    parts = [data.training_windows(corpus, 32, 0, 5, range(start, start + 2)).tokens for start in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(data.training_windows(corpus, 32, 0, 6, range(8)).tokens, whole)
    assert not torch.equal(data.training_windows(corpus, 32, 1, 5, range(8)).tokens, whole)


def test_windows_are_pieces_of_the_text_and_reach_all_of_it(corpus: data.Corpus) -> None:
    text = bytes(corpus.train.content.tolist())
    windows = data.training_windows(corpus, 32, 0, 1, range(400)).tokens
    starts = [text.index(bytes(window)) for window in windows.tolist()]
    quarter = Counter(4 * start // len(text) for start in starts)
    assert len(quarter) == 4 and min(quarter.values()) > 50


def test_bounds_of_documents_are_starts_of_windows_and_of_files(pattern: str, corpus: data.Corpus) -> None:
    held_out = bytes(corpus.validation.content.tolist())
    texts = [path.read_bytes() for path in sorted(Path(pattern).parent.iterdir())]
    files = [text for text in texts if text != held_out]
    windows = data.training_windows(corpus, 1000, 0, 1, range(8))
    whole = bytes(corpus.train.content.tolist())
    bounds = [0]
    for row, tokens in enumerate(windows.tokens.tolist()):
        start = whole.index(bytes(tokens))
        firsts = [sum(map(len, files[:i])) - start for i in range(len(files))]
        bounds += [*(1000 * row + first for first in firsts if 0 < first < 1000), 1000 * (row + 1)]
    assert windows.cu_seqlens == tuple(bounds) and len(bounds) > 10


def test_validation_windows_span_the_held_out_text(corpus: data.Corpus) -> None:
    windows = data.validation_windows(corpus, 32, 4, range(4)).tokens
    assert torch.equal(windows[0], corpus.validation.content[:32].long())
    assert torch.equal(windows[-1], corpus.validation.content[-32:].long())
    assert torch.equal(data.validation_windows(corpus, 32, 4, range(2, 4)).tokens, windows[2:])


def test_a_text_of_one_window(tmp_path: Path) -> None:
    for name in ("a.txt", "valid.txt"):
        (tmp_path / name).write_bytes(b"xy" * 16)
    corpus = data.read_corpus(DataConfig(files=str(tmp_path / "*.txt"), length=32))
    assert data.training_windows(corpus, 32, 0, 1, range(3)).tokens.shape == (3, 32)
    assert data.validation_windows(corpus, 32, 1, range(1)).tokens.shape == (1, 32)


def test_errors_name_the_key(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.files='.*nothing.*' names 0 files; give a file, a folder or a glob"):
        data.read_corpus(DataConfig(files=str(tmp_path / "nothing*"), length=8))
    with pytest.raises(
        RecipeError, match=r"data\.length=100000 is longer than the \d+ bytes of the training text \(by name\)"
    ):
        data.read_corpus(DataConfig(files=pattern, length=100_000))
    (tmp_path / "valid.txt").write_bytes(b"7" * 500)
    (tmp_path / "other.txt").write_bytes(b"12" * 500)
    with pytest.raises(
        RecipeError, match="validation text .by name. is one byte, 55, again and again; name other text"
    ):
        data.read_corpus(DataConfig(files=str(tmp_path), length=8))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"data\.files='.*gone.txt' names 0 files"):
        data.read_corpus(DataConfig(files=str(tmp_path / "gone.txt"), length=8))
