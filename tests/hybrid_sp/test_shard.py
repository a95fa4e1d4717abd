"""Spans, and cutting and joining tensors by them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import hybrid_sp as hsp
from hybrid_sp.comm import groups
from hybrid_sp.shard import spans_of
from tests.support.ranks import run_ranks


def test_spans_of_a_rank() -> None:
    assert [spans_of(r, 3, "contiguous") for r in range(3)] == [(0,), (1,), (2,)]
    assert [spans_of(r, 3, "zigzag") for r in range(3)] == [(0, 5), (1, 4), (2, 3)]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_one_device_holds_everything(layout: str) -> None:
    shard = hsp.SequenceParallel(None, layout=layout).shard(11)
    x = torch.arange(22).view(2, 11)
    assert shard.tokens == 11 and shard.positions.tolist() == list(range(11))
    assert torch.equal(shard.take(x), x) and torch.equal(shard.gather(x), x)


def test_too_few_tokens_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="0 tokens cannot be cut into 1 spans.*longer sequences or fewer ranks"):
        hsp.SequenceParallel(None, layout="zigzag").shard(0)


def test_unknown_choices_are_refused() -> None:
    for choice in ({"layout": "spiral"}, {"linear": "rings"}, {"softmax": "ring_attention"}):
        ((name, value),) = choice.items()
        with pytest.raises(ValueError, match=f"{name} must be one of .*got '{value}'"):
            hsp.SequenceParallel(None, **choice)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 4], [0, 2, 2, 3], [0, 3, 2, 4], [0, 4, 0, 4], [], [4]])
def test_bounds_of_documents_that_do_not_fit_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 4 tokens .* never fall"):
        hsp.SequenceParallel(None).shard(4, cu_seqlens=bounds)


def test_bounds_of_documents_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must be whole numbers, got \[0, 2.5, 4\]"):
        hsp.SequenceParallel(None).shard(4, cu_seqlens=[0, 2.5, 4])  # type: ignore[list-item]


def check_documents(group: Any, layout: str) -> None:
    """Positions, labels and boundaries of random documents, some of them empty, token by token."""
    random = torch.Generator().manual_seed(0)
    for length in (8, 23, 64):
        for count in (1, 2, 5, length):
            inner = torch.randperm(length - 1, generator=random)[: count - 1] + 1
            full = torch.tensor([0, *inner.sort().values.tolist(), length])
            bounds = full.repeat_interleave(torch.randint(1, 4, (count + 1,), generator=random))
            begins, count = set(full.tolist()) - {0, length}, len(bounds) - 1
            shard = hsp.SequenceParallel(group, layout=layout).shard(length, bounds)
            tokens = torch.arange(length)
            document = [next(d for d in range(count) if t < bounds[d + 1]) for t in range(length)]
            assert shard.positions.tolist() == shard.take(tokens - bounds[document], 0).tolist()
            want = [t + 1 if t + 1 < length and document[t + 1] == document[t] else -100 for t in range(length)]
            assert shard.labels(tokens[None]).tolist() == shard.take(torch.tensor([want])).tolist()
            assert [shard.document_start(t) for t in range(length)] == bounds[document].tolist()
            assert [shard.document_end(t) for t in range(length)] == bounds[torch.tensor(document) + 1].tolist()
            mine = shard.take(tokens, 0).tolist()
            assert [mine[t] for t in shard.local_boundaries] == [t for t in mine if t in begins]
            for span, (start, end) in enumerate(itertools.pairwise(shard.bounds)):
                assert (span in shard.broken) == any(start <= t < end for t in begins)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_documents(layout: str) -> None:
    for world in (1, 3, 4):
        run_ranks(check_documents, world, layout)


def check_shard(group: Any, layout: str, length: int) -> list[int]:
    shard = hsp.SequenceParallel(group, layout=layout, check="calls").shard(length)
    tokens = torch.arange(100, 100 + 2 * length).view(2, length)
    here = shard.positions
    assert shard.tokens == len(here) == sum(end - start for start, end in shard.spans)
    assert torch.equal(shard.take(tokens), tokens[:, here])
    following = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    assert torch.equal(shard.labels(tokens), following[:, here])

    x = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = x.clone().requires_grad_()
    local = shard.take(whole)
    (taken,) = torch.autograd.grad(local.sum(), whole)
    assert torch.equal(taken[0, :, 0].nonzero().flatten(), here)

    local = shard.take(x).requires_grad_()
    joined = shard.gather(local)
    assert torch.equal(joined, x)
    rank, ranks = groups.rank(group), groups.size(group)
    (d_local,) = torch.autograd.grad((joined * x * (rank + 1)).sum(), local)
    assert torch.allclose(d_local, shard.take(x) * sum(range(1, ranks + 1)), rtol=1e-14, atol=0)
    return here.tolist()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_hold_every_token_once(world: int, layout: str) -> None:
    for length in (8, 11, 29):
        held = run_ranks(check_shard, world, layout, length)
        assert sorted(sum(held, [])) == list(range(length))
        assert max(map(len, held)) - min(map(len, held)) <= 2


def test_wrong_lengths_raise_before_communication() -> None:
    shard = hsp.SequenceParallel(None).shard(6)
    x = torch.randn(1, 5, 2, 4)
    with pytest.raises(ValueError, match="take: dim 1 of x has 5 tokens, the sequence has 6"):
        shard.take(x)
    with pytest.raises(ValueError, match="q has 5 tokens, rank 0 of 1 holds 6 of 6"):
        hsp.linear_attention(x, x, x, shard=shard)
    with pytest.raises(ValueError, match="q has 5 tokens"):
        hsp.softmax_attention(x, x, x, shard=shard)
