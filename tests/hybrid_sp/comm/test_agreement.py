"""Ranks that were given different sequences or strategies say so, all of them, before they compute."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hybrid_sp as hsp
from hybrid_sp import Shard
from hybrid_sp.comm import collectives, groups
from hybrid_sp.comm.link import Link
from hybrid_sp.comm.pending import CommunicationError
from tests.support.ranks import run_ranks

Ones = Callable[..., Tensor]  # [1, tokens, ...] of these last dims

OPERATORS: dict[str, Callable[[Shard, Ones], Any]] = {
    "linear": lambda shard, x: hsp.linear_attention(x(2, 4), x(2, 4), x(2, 4), shard=shard),
    "not causal": lambda shard, x: hsp.linear_attention(x(2, 4), x(2, 4), x(2, 4), shard=shard, causal=False),
    "delta": lambda shard, x: hsp.delta_rule(x(2, 4), x(2, 4), x(2, 4), beta=x(2), shard=shard),
    "softmax": lambda shard, x: hsp.softmax_attention(x(2, 4), x(2, 4), x(2, 4), shard=shard),
    "window": lambda shard, x: hsp.softmax_attention(x(2, 4), x(2, 4), x(2, 4), window=3, shard=shard),
    "conv": lambda shard, x: hsp.short_conv(x(4), torch.ones(4, 3), shard=shard),
    "shift": lambda shard, x: hsp.token_shift(x(4), shard=shard),
    "gather": lambda shard, x: shard.gather(x(4)),
}
DIFFERENCES: dict[str, tuple[str, Any, Any]] = {  # an argument, what rank 1 is given, and what the others are
    "length": ("length", 26, 24),
    "documents": ("cu_seqlens", [0, 7, 24], [0, 9, 24]),
    "no documents": ("cu_seqlens", None, [0, 24]),
    "layout": ("layout", "zigzag", "contiguous"),
    "states": ("linear", "ring", "all_gather"),
    "keys": ("softmax", "ring", "all_gather"),
    "key heads": ("kv_heads_per_gather", 1, None),
    "keys kept": ("keep_kv", False, True),
    "overlap": ("overlap", ["linear", "conv"], ["conv"]),
    "check": ("check", "calls", "sequence"),
    "link": ("link", Link(latency=1.0, bandwidth=2.0), None),
}


def default_shard(group: Any, **given: Any) -> Shard:
    sequence = {"length": 24} | {name: given.pop(name) for name in ("length", "cu_seqlens") if name in given}
    return hsp.SequenceParallel(group, **given).shard(**sequence)


def compute(kind: str, shard: Shard) -> Any:
    return OPERATORS[kind](shard, lambda *dims: torch.ones(1, shard.tokens, *dims, requires_grad=True))


def differ(group: Any, cases: list[tuple[str, str]]) -> list[list[str]]:
    """What two calls of an operator raise, of each case."""
    said = []
    for how, kind in cases:
        name, *values = DIFFERENCES[how]
        shard = default_shard(group, **{name: values[groups.rank(group) != 1]})
        errors = []
        for _ in range(2):
            with pytest.raises(ValueError, match=r"^sp\.shard: ") as caught:
                compute(kind, shard)
            errors.append(str(caught.value))
        said.append(errors)
    return said


def test_every_difference_is_one_error_on_every_rank() -> None:
    cases = [(how, "linear") for how in DIFFERENCES] + [("layout", kind) for kind in OPERATORS]
    by_rank = run_ranks(differ, 3, cases)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    for (how, _), (first, again) in zip(cases, by_rank[0], strict=True):
        name, theirs, ours = (re.escape(str(word)) for word in DIFFERENCES[how])
        quote = "'?" if name in ("layout", "linear", "softmax", "check") else ""
        words = [f"{name}={quote}{x}{quote}".replace(r"\[", r"[(\[]").replace(r"\]", r"[)\]]") for x in (ours, theirs)]
        want = f".* different arguments: ranks 0, 2: {words[0]}; rank 1: {words[1]}. Give all of them the same length, "
        assert re.match(want, first), (want, first)
        assert again == first


def test_no_difference_is_none() -> None:
    """Also where ranks say the same in other words, and with operators that ask several times."""
    run_ranks(alike, 3)


def alike(group: Any) -> None:
    first = groups.rank(group) == 0
    bounds = [0, 9, 24] if first else torch.tensor([0, 9, 24])
    overlap = True if first else ("conv", "softmax", "linear")
    shard = default_shard(group, cu_seqlens=bounds, overlap=overlap)
    for kind in OPERATORS:
        if kind != "not causal":
            compute(kind, shard)


def refused_here(group: Any, bounds: list[list[Any]]) -> str:
    """What a rank raises, at its shard or at its first operator."""
    with pytest.raises(ValueError) as caught:
        compute("linear", default_shard(group, cu_seqlens=bounds[groups.rank(group)]))
    return str(caught.value)


def test_ranks_that_refuse_what_others_accept_do_not_leave_them_waiting() -> None:
    for wrong in ([0, 9, 5, 24], [0, 2.5, 24]):
        told = run_ranks(refused_here, 2, [[0, 9, 24], wrong])
        assert told[0] == told[1] and "rank 0: cu_seqlens=(0, 9, 24); rank 1: cu_seqlens=" in told[0]
    for fault in run_ranks(refused_here, 2, [[0, 9, 5, 24]] * 2):
        assert "cu_seqlens must rise from 0 to the 24 tokens of the sequence and never fall" in fault


def launched_and_awaited(group: Any) -> None:
    """Rank 1 makes its shard when rank 0, which has made its own and cut by it, says so."""
    note, rank = torch.zeros(1), groups.rank(group)
    if rank == 1:
        dist.recv(note, src=0)
    shard = default_shard(group)
    assert shard.take(torch.arange(24), 0).tolist() == shard.positions.tolist()
    if rank == 0:
        dist.send(note, dst=1)
    compute("linear", shard)


def test_a_shard_waits_for_nobody_and_its_first_operator_does() -> None:
    run_ranks(launched_and_awaited, 2)


def several(group: Any) -> None:
    """Shards that nobody uses, used in another order, and again in a recomputation; nothing of it is counted."""
    sp = hsp.SequenceParallel(group)
    with hsp.ledger() as book:
        unused, a, b, _ = (sp.shard(length) for length in (24, 30, 32, 8))
        for shard in (b, a):
            compute("conv", shard)
        assert {row.tag for row in book.rows} == {wait.tag for wait in book.waits} == {"conv"} and book.calls == 2

        def body(x: Tensor) -> Tensor:
            return hsp.softmax_attention(x, x, x, shard=unused)

        x = torch.ones(1, unused.tokens, 2, 4, requires_grad=True)
        for contexts in ({}, {"context_fn": hsp.checkpoint_contexts}):
            out: Tensor = checkpoint(body, x, use_reentrant=False, **contexts)
            out.sum().backward()


def test_shards_unused_used_late_and_in_a_recomputation() -> None:
    run_ranks(several, 2)


def without_cpu(group: Any) -> list[str]:
    """Of a group that sends what lies on a device alone, as NCCL does."""
    device = dist.new_group(backend="cuda:gloo")
    shards = [default_shard(device, length=length) for length in (24, 24 + dist.get_rank())]
    shards[0].require_agreement()
    with pytest.raises(ValueError, match="rank 0: length=24; rank 1: length=25"):
        shards[1].require_agreement()
    return sorted(str(dist.get_backend_config(twin)) for twin in groups._twins[device].values())


def test_a_group_of_devices_compares_over_a_twin_on_the_cpu() -> None:
    assert run_ranks(without_cpu, 2) == [["cpu:gloo,cuda:gloo"]] * 2


def never_comes(group: Any) -> None:
    class Late:
        def wait(self) -> None:
            raise RuntimeError("timed out")

    gather = collectives._all_gather_single
    collectives._all_gather_single = lambda *_, **__: Late()
    try:
        shard = default_shard(group)
    finally:
        collectives._all_gather_single = gather
    words = rf"rank {dist.get_rank()} failed in: .* sp.shard \(length=24\), which every rank .*: timed out"
    with pytest.raises(CommunicationError, match=words):
        compute("linear", shard)


def test_a_rank_that_makes_no_shard_is_named_by_what_it_did_not_call() -> None:
    run_ranks(never_comes, 2)


def count_texts(group: Any, check: Any) -> tuple[int, int]:
    """Comparisons at the shard, and later, of a convolution forward and backward."""
    made, start = [0], collectives.start_texts

    def counted(*args: Any) -> Any:
        made[0] += 1
        return start(*args)

    collectives.start_texts = counted
    try:
        shard = default_shard(group, check=check)
        at_shard = made[0]
        compute("conv", shard).sum().backward()
    finally:
        collectives.start_texts = start
    return at_shard, made[0] - at_shard


def test_what_each_choice_compares() -> None:
    for check, counts in ((False, (0, 0)), ("sequence", (1, 0)), ("calls", (1, 2))):
        assert run_ranks(count_texts, 2, check) == [counts] * 2


@pytest.mark.parametrize("check", [True, None, "call"])
def test_other_choices_are_refused(check: Any) -> None:
    with pytest.raises(ValueError, match=rf"check must be one of \('sequence', 'calls', False\), got {check!r}"):
        hsp.SequenceParallel(None, check=check)


def test_long_arguments_are_told_shortened_and_compared_whole() -> None:
    run_ranks(long_documents, 2)


def long_documents(group: Any) -> None:
    bounds = list(range(5001))
    bounds[2500] += groups.rank(group)
    with pytest.raises(
        ValueError, match=r"rank 0: cu_seqlens=\(0, 1, 2.* \.\.\. .* 5000\) \(crc32 .*\); rank 1:"
    ) as caught:
        compute("shift", default_shard(group, length=5000, cu_seqlens=bounds))
    assert len(str(caught.value)) < 600
