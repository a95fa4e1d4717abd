"""Latent attention: what travels and when, what is kept, and what is refused. Numbers are held by `test_parity.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hybrid_sp as hsp
from hybrid_sp.ops import latent_attention
from tests.hybrid_sp.cases import LONG_DOCUMENTS, latent_cases, truth
from tests.hybrid_sp.ops.test_parity import LAYOUTS, check_cases
from tests.hybrid_sp.test_overlap import counted, in_flight
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks

KIMI = {"heads": 32, "nope": 128, "shared": 64, "latent": 512, "value": 128}  # Kimi Linear, arXiv 2510.26692


def inputs(shard: hsp.Shard, dtype: torch.dtype = torch.float64, **sizes: int) -> list[Tensor]:
    """This rank's q, latent and rope_k, and the weights, as leaves."""
    sizes = {"heads": 4, "nope": 4, "shared": 2, "latent": 5, "value": 3} | sizes
    H, N, R, C, V = (sizes[name] for name in ("heads", "nope", "shared", "latent", "value"))
    make = torch.Generator().manual_seed(0)
    shapes = [(1, shard.length, H, N + R), (1, shard.length, C), (1, shard.length, R), (H, N, C), (H, V, C)]
    drawn = [torch.randn(shape, generator=make, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in (*(shard.take(x) for x in drawn[:3]), *drawn[3:])]


def traffic(group: Any, keep: bool, documents: tuple[int, ...] | None, sizes: dict[str, int]) -> list[Any]:
    shard = hsp.SequenceParallel(group, layout="zigzag", keep_kv=keep, check="calls").shard(256, documents)
    x = inputs(shard, torch.bfloat16, **sizes)
    with hsp.ledger() as book:
        hsp.latent_attention(*x, shard=shard).float().sum().backward()
    return [(row.collective, row.direction, row.bytes) for row in book.rows]


@pytest.mark.parametrize("keep", [True, False])
def test_only_the_latent_travels_and_its_gradient_returns_at_once(keep: bool) -> None:
    """At Kimi Linear's sizes: 576 numbers of a token, where expanded keys and values would be 10,240."""
    row = KIMI["latent"] + KIMI["shared"]
    forward = ("all_gather", "forward", 64 * row * 2 * 3)
    again = [] if keep else [("all_gather", "backward", 64 * row * 2 * 3)]
    want = [forward, *again, ("reduce_scatter", "backward", 64 * row * 4 * 3)]
    assert run_ranks(traffic, 4, keep, None, KIMI) == [want] * 4
    expanded = KIMI["heads"] * (KIMI["nope"] + KIMI["shared"] + KIMI["value"])
    assert expanded / row > 17


def test_packed_documents_receive_what_they_see() -> None:
    for rows in run_ranks(traffic, 2, True, (0, 100, 130, 256), {}):
        assert [row[:2] for row in rows] == [("all_to_all", "forward"), ("all_to_all", "backward")]
        assert rows[0][2] < 128 * 7 * 2


def recomputed(group: Any, keep: bool) -> list[int]:
    shard = hsp.SequenceParallel(group, keep_kv=keep).shard(24)
    calls, grads = [], []
    for context in (None, hsp.checkpoint_contexts):
        x = inputs(shard)
        with hsp.ledger() as book:
            if context is None:
                o = hsp.latent_attention(*x, shard=shard)
            else:
                o = checkpoint(hsp.latent_attention, *x, shard=shard, use_reentrant=False, context_fn=context)
            grads.append(torch.autograd.grad(o.square().sum(), x))
        calls.append(book.calls)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    return calls


@pytest.mark.parametrize("keep", [True, False])
def test_recomputation_communicates_nothing(keep: bool) -> None:
    assert run_ranks(recomputed, 2, keep) == [[2, 2] if keep else [3, 3]] * 2


def order(group: Any, keep: bool, few: int | None) -> list[str]:
    """What a rank does: how many heads it expands of how many tokens, and what it launches and waits for."""
    sp = hsp.SequenceParallel(group, keep_kv=keep, kv_heads_per_gather=few)
    shard, log = sp.shard(24), list[str]()
    expand = latent_attention._expand

    def noted(rows: Tensor, w_k: Tensor, w_v: Tensor) -> tuple[Tensor, Tensor]:
        log.append(f"{len(w_k)} of {rows.shape[1]}")
        return expand(rows, w_k, w_v)

    x = inputs(shard)
    with pytest.MonkeyPatch.context() as patch, counted() as made:
        patch.setattr(latent_attention, "_expand", noted)
        o = hsp.latent_attention(*x, shard=shard)
        assert in_flight(made) == 0
        log.append("backward")
        o.sum().backward()
        assert in_flight(made) == 0
    return log


def test_heads_are_expanded_a_few_at_a_time_and_again_in_backward() -> None:
    own, rest = ["3 of 12", "1 of 12"], ["3 of 24", "1 of 24"]
    first, second = run_ranks(order, 2, True, 3)
    assert first == [*own, "backward", *own], "the first rank sees no other's tokens"
    assert second == [*own, *rest, "backward", *rest, *own]
    assert run_ranks(order, 2, False, 3)[1] == [*own, *rest, "backward", *own, *rest]
    assert run_ranks(order, 1, True, None) == [["4 of 24", "backward", "4 of 24"]]


@pytest.mark.parametrize("baseline", ["ulysses", "ring"])
def test_baselines_exchange_what_is_expanded(baseline: str) -> None:
    cases = [replace(case, softmax=baseline, layout=LAYOUTS[i % 2]) for i, case in enumerate(latent_cases())]
    run_ranks(check_cases, 2, [(case, truth(case)) for case in cases], 8, 64)


def test_one_query_reads_a_cache_of_latents() -> None:
    """As in decoding: the last token's output from all latents, and no shard."""
    shard = hsp.SequenceParallel(None).shard(9)
    q, latent, rope_k, w_k, w_v = (x.detach() for x in inputs(shard))
    whole = hsp.latent_attention(q, latent, rope_k, w_k, w_v)
    last = hsp.latent_attention(q[:, -1:], latent, rope_k, w_k, w_v, causal=False)
    assert_close("last", last, whole[:, -1:], 1e-13)


def leaks(group: Any) -> None:
    """Changing a token changes nothing before it, and nothing of other documents."""
    shard = hsp.SequenceParallel(group, layout="zigzag").shard(107, LONG_DOCUMENTS)
    x = inputs(shard)
    changed = [value.detach().clone() for value in x]
    token = 50
    for value in changed[:3]:
        for local, (start, end) in zip(range(len(shard.spans)), shard.spans, strict=True):
            if start <= token < end:
                value[:, sum(shard.span_lengths[:local]) + token - start] += 1.0
    before, after = (hsp.latent_attention(*given, shard=shard).detach() for given in (x, changed))
    places = torch.cat([torch.arange(start, end) for start, end in shard.spans])
    same = (places < token) | (places >= 100)
    assert torch.equal(before[:, same], after[:, same])
    assert (before[:, ~same] != after[:, ~same]).any(-1).all()


def test_nothing_leaks_from_later_tokens_or_other_documents() -> None:
    run_ranks(leaks, 2)


WRONG: dict[str, Any] = {
    "w_k .*must be .*latent dim.*4 heads of q and the 5 columns": lambda x: (*x[:3], x[3][:3], x[4]),
    "q has 6 columns, w_k makes 3 and rope_k has 2": lambda x: (*x[:3], x[3][:, :3], x[4]),
    "latent .* and rope_k .* must be": lambda x: (x[0], x[1], x[2][:, :3], *x[3:]),
    "must share a dtype": lambda x: (x[0].float(), *x[1:]),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_does_not_fit_is_refused(said: str) -> None:
    x = inputs(hsp.SequenceParallel(None).shard(9))
    with pytest.raises(ValueError, match=f"latent_attention: .*{said}"):
        hsp.latent_attention(*WRONG[said](x))
