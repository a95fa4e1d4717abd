"""The cost facts that no mixer states: halos and gradients against the ledger, and the sizes of transitions."""

from __future__ import annotations

import pytest
import torch

import hybrid_sp as hsp
from hybrid_sp.comm.groups import Group
from layers.cost import gradient_all_reduce, halo_backward, halo_forward, transition_elements
from tests.support.ranks import run_ranks

B, TOKENS, CHANNELS = 2, 3, 5
CUTS = [(2, 24, "contiguous"), (2, 24, "zigzag"), (3, 25, "contiguous"), (3, 25, "zigzag")]


def count_halos(group: Group, length: int, layout: str) -> tuple[int, int]:
    """Bytes that this rank receives forward and backward for a short convolution, as the ledger counts them."""
    shard = hsp.SequenceParallel(group, layout=layout, check="calls").shard(length)
    x, weight = torch.rand(B, shard.tokens, CHANNELS), torch.rand(CHANNELS, TOKENS + 1)
    with hsp.ledger() as book:
        hsp.short_conv(x.requires_grad_(), weight.requires_grad_(), shard=shard).sum().backward()
    forward, backward = (sum(row.bytes for row in book.select(direction=way)) for way in ("forward", "backward"))
    return forward, backward


@pytest.mark.parametrize(("P", "length", "layout"), CUTS)
def test_halos_are_what_the_ledger_counts(P: int, length: int, layout: str) -> None:
    spans = 2 if layout == "zigzag" else 1
    for rank, counted in enumerate(run_ranks(count_halos, P, length, layout)):
        halo = {"P": P, "B": B, "tokens": TOKENS, "channels": CHANNELS, "spans": spans, "rank": rank}
        assert counted == (halo_forward(**halo, element_bytes=4), halo_backward(**halo)), f"rank {rank}"


def test_the_sum_of_gradients() -> None:
    assert gradient_all_reduce(P=4, parameters=1000) == 6000
    assert gradient_all_reduce(P=1, parameters=1000) == 0


def test_an_unknown_transition_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'diagonal'.*none, fixed, scalar, vector, matrix"):
        transition_elements("diagonal", 4)
