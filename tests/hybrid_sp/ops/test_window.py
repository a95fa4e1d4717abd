"""Attention of a window and of packed documents: what is communicated, and when; what it costs; what must not leak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives
from hybrid_sp.comm.pending import Pending
from hybrid_sp.kernels.softmax import tiles
from hybrid_sp.ops import softmax_attention
from tests.hybrid_sp.cases import Case, truth
from tests.hybrid_sp.ops.test_parity import LAYOUTS, check_cases
from tests.support.ranks import run_ranks

Leaves = dict[str, Tensor]


def attention(window: int | None = None, length: int = 23, **options: Any) -> Case:
    return Case(operator="softmax", groups=2, window=window, length=length, **options)


def leaves_of(case: Case, shard: hsp.Shard, dtype: torch.dtype = torch.float64) -> Leaves:
    return {name: shard.take(x).detach().requires_grad_() for name, x in case.inputs(dtype).items()}


MANY = (0, 1, 2, 6, 7, 8, 9, 13, 20, 22, 23)  # documents of one token, several in a span, and on the bounds of spans
ENDS = (0, 9, 23)  # one document at both ends of a zigzag rank, two ranks wide


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_parity_of_short_spans_and_documents(world: int, layout: str) -> None:
    cases = [attention(w, length) for w in (2, 5, 8) for length in (8, 9, 23)]
    cases += [attention(w, documents=documents) for w in (None, 2, 5, 16) for documents in (MANY, ENDS)]
    cases += [attention(causal=False, documents=documents) for documents in (MANY, ENDS)]
    given = [(replace(case, layout=layout), truth(case)) for case in cases]
    assert run_ranks(check_cases, world, given, 8, 64) == [len(cases)] * world


def rows_seen(case: Case, shard: hsp.Shard) -> tuple[int, int]:
    """Tokens of others that this rank's queries see, and its own that others' see, once for each span that does."""
    owner = {t: rank for rank in range(shard.sp.size) for a, b in shard.spans_at(rank) for t in range(a, b)}

    def seen(rank: int) -> list[int]:
        spans = [range(a, b) for a, b in shard.spans_at(rank)] if case.causal else [sorted(rank_tokens(shard, rank))]
        tokens = []
        for span in spans:
            reach = set()
            for t in span:
                end = t + 1 if case.causal else shard.document_end(t)
                reach |= set(range(max(shard.document_start(t), t + 1 - (case.window or case.length)), end))
            tokens += sorted(reach - set(span))
        return tokens

    me = shard.sp.rank
    others = [owner[t] for rank in range(shard.sp.size) if rank != me for t in seen(rank)]
    return sum(owner[t] != me for t in seen(me)), others.count(me)


def rank_tokens(shard: hsp.Shard, rank: int) -> set[int]:
    return {t for a, b in shard.spans_at(rank) for t in range(a, b)}


def ledger_of(group: Any, case: Case, dtype: torch.dtype = torch.float32) -> list[tuple[str, str, int]]:
    """Rows of the ledger; where it is not a gather, their bytes must be those of the tokens seen."""
    shard = hsp.SequenceParallel(group, layout=case.layout, check="calls").shard(case.length, case.documents)
    x = leaves_of(case, shard, dtype)
    with hsp.ledger() as book:
        case.call(x, shard)[0].sum().backward()
    assert {r.tag for r in book.rows} <= {"softmax"}
    rows = [(r.collective, r.direction, r.bytes) for r in book.rows]
    received, returned = rows_seen(case, shard)
    token = 2 * x["k"].shape[0] * x["k"][0, 0].numel()
    if not rows:
        assert received == returned == 0
    elif rows[0][0] == "all_to_all":
        assert [r[2] for r in rows] == [received * token * dtype.itemsize, returned * token * 4]
    return rows


def kinds(ranks: list[list[tuple[str, str, int]]]) -> list[str]:
    names = [[f"{collective} {direction}" for collective, direction, _ in rows] for rows in ranks]
    assert all(row == names[0] for row in names)
    return names[0]


HALO = ["all_to_all forward", "all_to_all backward"]
GATHER = ["all_gather forward", "reduce_scatter backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_receives_what_it_sees_however_long_the_sequence(layout: str, dtype: torch.dtype) -> None:
    found = [run_ranks(ledger_of, 4, attention(5, length, layout=layout), dtype) for length in (64, 640)]
    assert kinds(found[0]) == HALO and found[0] == found[1]
    spans = 1 if layout == "contiguous" else 2
    assert max(rows[0][2] for rows in found[0]) == spans * 4 * 2 * 2 * 2 * 6 * dtype.itemsize  # spans W-1 KV B G D


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_smaller_exchange_is_made(layout: str) -> None:
    for case, want in (
        (attention(2), HALO),
        (attention(22), GATHER),
        (attention(1), []),
        (attention(None), GATHER),
        (attention(documents=MANY), HALO),
        (attention(documents=MANY, causal=False), HALO),
        (attention(documents=(0, 23)), GATHER),
        (attention(causal=False), GATHER),
    ):
        assert kinds(run_ranks(ledger_of, 4, replace(case, layout=layout))) == want, case
    assert kinds(run_ranks(ledger_of, 2, attention(3, 24, documents=(0, 6, 12, 18, 24), layout=layout))) == []
    assert kinds(run_ranks(ledger_of, 2, attention(7, 24, layout="zigzag"))) == HALO  # 6 of 12 tokens are its own


def logged(group: Any, overlap: bool) -> list[str]:
    """Launches, waits, and attention over own keys and over those of other ranks, forward and backward."""
    log: list[str] = []
    launch, own = collectives.start_all_to_all, {}

    def launched(*args: Any) -> Pending:
        direction = args[4].direction
        log.append(f"launch {direction}")
        pending = launch(*args)

        def waited() -> Any:
            log.append(f"wait {direction}")
            return pending.wait()

        return Pending(waited)

    def noted(name: str) -> Callable[..., Any]:
        def run(todo: Any, *args: Any) -> Any:
            log.append(f"{name} {'own' if any(part.fresh for part in todo) else 'others'}")
            return own[name](todo, *args)

        return run

    case = attention(3, 24)
    shard = hsp.SequenceParallel(group, overlap=overlap).shard(24)
    try:
        collectives.start_all_to_all = launched
        for name in ("attend_tiles", "attend_tiles_backward"):
            own[name] = getattr(softmax_attention, name)
            setattr(softmax_attention, name, noted(name))
        case.call(leaves_of(case, shard), shard)[0].sum().backward()
    finally:
        collectives.start_all_to_all = launch
        for name, function in own.items():
            setattr(softmax_attention, name, function)
    return log


def test_own_keys_are_attended_to_while_the_others_are_in_flight() -> None:
    own, others = ["attend_tiles own"], ["attend_tiles others"]
    d_own, d_others = ["attend_tiles_backward own"], ["attend_tiles_backward others"]
    assert run_ranks(logged, 2, True)[1] == [
        *("launch forward", *own, "wait forward", *others),
        *(*d_others, "launch backward", *d_own, "wait backward"),
    ]
    assert run_ranks(logged, 2, False)[1] == [
        *("launch forward", "wait forward", *own, *others),
        *(*d_others, "launch backward", "wait backward", *d_own),
    ]


def leaks(group: Any, layout: str) -> None:
    """Change one token: the outputs that see it move, and no other by a bit."""
    length, documents, changed = 37, (0, 12, 13, 30, 37), 15
    shard = hsp.SequenceParallel(group, layout=layout, check="calls").shard(length, documents)
    for case, end in (
        (attention(4, length, documents=documents), 19),
        (attention(None, length, documents=documents), 30),
        (attention(None, length, documents=documents, causal=False), 30),
    ):
        inputs = case.inputs()
        other = {name: x.clone() for name, x in inputs.items()}
        for x in other.values():
            x[:, changed] = 1e3
        a, b = (shard.gather(case.call({n: shard.take(y) for n, y in x.items()}, shard)[0]) for x in (inputs, other))
        moved = [t for t in range(length) if not torch.equal(a[:, t], b[:, t])]
        assert moved == list(range(changed if case.causal else 13, end)), f"{case} on rank {shard.sp.rank}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leak_and_dependence(layout: str) -> None:
    for world in (1, 2, 4):
        run_ranks(leaks, world, layout)


def test_the_work_of_a_window_grows_with_the_tokens_alone() -> None:
    """Pairs of a query and a key that the kernels are given."""

    def pairs(tokens: int) -> int:
        return sum(part.repeats * part.queries * part.keys for part in tiles.own(0, tokens, 16))

    assert pairs(1600) < 2 * 16 * 1600 and pairs(16000) < 10.1 * pairs(1600)


Q, K = torch.rand(2, 6, 4, 4), torch.rand(2, 6, 2, 4)


@pytest.mark.parametrize(
    ("message", "q", "options"),
    [
        ("window must be at least 1 token, the token itself, got 0", Q, {"window": 0}),
        ("window must be at least 1 token, the token itself, got -3", Q, {"window": -3}),
        ("a window needs causal=True", Q, {"window": 3, "causal": False}),
        ("the batch is 2", Q, {"shard": hsp.SequenceParallel(None).shard(6, (0, 2, 6))}),
        ("k has 6 tokens", Q[:, :5], {"shard": hsp.SequenceParallel(None).shard(5), "causal": False}),
    ],
)
def test_refusals(message: str, q: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"softmax_attention: .*{message}"):
        hsp.softmax_attention(q, K, K, **options)
