"""A list of parts is the mask that it stands for: every visible pair once, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_sp.kernels.softmax import tiles
from hybrid_sp.kernels.softmax.tiles import Tile


def plan_mask(todo: list[Tile], queries: int, keys: int) -> Tensor:
    """How often each query [rows] sees each key [columns]; marked through the same views that the attention reads."""
    seen = torch.zeros(queries, keys, dtype=torch.int64)
    names = [torch.arange(n)[None, :, None] for n in (queries, keys)]
    for part in todo:
        rows, columns = part.of_queries(names[0])[0, ..., 0], part.of_keys(names[1])[0, ..., 0]
        assert rows.shape == (part.repeats, part.queries) and columns.shape == (part.repeats, part.keys)
        pairs = torch.ones(part.queries, part.keys, dtype=torch.int64)
        if part.kind != "full":
            assert part.queries == part.keys
            pairs = pairs.tril() if part.kind == "causal" else pairs.triu()
        for row, column in zip(rows, columns, strict=True):
            seen[row[:, None], column[None, :]] += pairs
    return seen


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 8, 21, 40])
def test_own_tokens(window: int | None) -> None:
    for tokens in range(1, 22):
        todo = tiles.own(2, tokens, window)
        away = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        want = torch.zeros(tokens + 2, tokens + 2, dtype=torch.int64)
        want[2:, 2:] = (away >= 0) & (away < (window or tokens))
        assert torch.equal(plan_mask(todo, tokens + 2, tokens + 2), want)
        first = torch.cat([part.of_queries(torch.arange(tokens + 2)[None]).flatten() for part in todo if part.fresh])
        assert first.tolist() == list(range(2, tokens + 2))  # each query has one part that begins its output


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 8, 21])
def test_tokens_before(window: int | None) -> None:
    for queries in range(1, 11):
        for keys in range(min(9, window or 9)):
            todo = tiles.earlier(1, queries, 3, keys, window)
            away = torch.arange(queries)[:, None] - torch.arange(-keys, 0)[None, :]
            want = torch.zeros(queries + 1, keys + 3, dtype=torch.int64)
            want[1:, 3:] = away < (window or queries + keys)
            assert torch.equal(plan_mask(todo, queries + 1, keys + 3), want)
            assert len(todo) <= 3 and not any(part.fresh for part in todo)


def test_the_number_of_kernel_calls_does_not_grow_with_the_tokens() -> None:
    assert len(tiles.own(0, 16, 8)) == 2 and len(tiles.own(0, 8000, 8)) == 2
    assert len(tiles.own(0, 8003, 8)) == 5
