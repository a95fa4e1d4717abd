"""What operators refuse, by name and before communicating; that they touch no input; leak and dependence."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import groups
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, dtype=dtype)


Q, K, V = x(2, 6, 2, 4), x(2, 6, 2, 4), x(2, 6, 4, 3)


@pytest.mark.parametrize(
    ("message", "args", "options"),
    [
        ("q and k must have one shape", (Q, x(2, 6, 2, 5), V), {}),
        ("must have the batch and tokens of q", (Q, K, x(2, 5, 4, 3)), {}),
        ("v has 3 heads, not a multiple of the 2 key heads", (Q, K, x(2, 6, 3, 3)), {}),
        ("must share a dtype", (Q, K, V.double()), {}),
        ("must be floating point", (Q.int(), K.int(), V.int()), {}),
        (r"must be \[batch, tokens, heads, dim\]", (Q[0], K[0], V[0]), {}),
        ("log_decay must be one of", (Q, K, V), {"log_decay": x(2, 6, 2)}),
        ("causal=False takes no log_decay", (Q, K, V), {"log_decay": -x(4), "causal": False}),
        ("bonus must be", (Q, K, V), {"bonus": x(2, 4)}),
        ("causal=False takes no bonus", (Q, K, V), {"bonus": x(4, 4), "causal": False}),
        ("causal=False takes no initial_state", (Q, K, V), {"initial_state": x(2, 4, 4, 3), "causal": False}),
        ("causal=False has no final state", (Q, K, V), {"return_final_state": True, "causal": False}),
        ("initial_state must have the shapes", (Q, K, V), {"initial_state": x(2, 2, 4, 3)}),
        ("initial_state must have the shapes", (Q, K, V), {"initial_state": x(2, 4, 4, 3), "normalize": True}),
        ("initial_state must be torch.float32", (Q, K, V), {"initial_state": x(2, 4, 4, 3).double()}),
        ("backend must be", (Q, K, V), {"backend": "cuda"}),
    ],
)
def test_linear_attention_refuses(message: str, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"linear_attention: .*{message}"):
        hsp.linear_attention(*args, **options)


@pytest.mark.parametrize(
    ("message", "args", "options"),
    [
        ("must share all dims but the last", (x(2, 6, 4, 4), x(2, 6, 2, 4), x(2, 6, 4, 3)), {}),
        ("sinks must be .* each of the 4 query heads", (x(2, 6, 4, 4), *[x(2, 6, 2, 4)] * 2), {"sinks": x(2)}),
        ("q has 3 heads, not a multiple of the 2", (x(2, 6, 3, 4), x(2, 6, 2, 4), x(2, 6, 2, 4)), {}),
        ("must share batch and head dim", (x(2, 6, 4, 8), x(2, 6, 2, 4), x(2, 6, 2, 4)), {}),
        ("must share a dtype", (x(2, 6, 4, 4).double(), x(2, 6, 2, 4), x(2, 6, 2, 4)), {}),
        ("k has 9 tokens", (x(2, 6, 4, 4), x(2, 9, 2, 4), x(2, 9, 2, 4)), {}),
        ("backend must be", (Q, K, K), {"backend": "flash"}),
    ],
)
def test_softmax_attention_refuses(message: str, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"softmax_attention: .*{message}"):
        hsp.softmax_attention(*args, **options)


def test_without_mask_keys_may_have_their_own_length() -> None:
    q, k, v = x(2, 1, 4, 8), x(2, 9, 2, 8), x(2, 9, 2, 8)
    for leaf in (q, k, v):
        leaf.requires_grad_()
    got = hsp.softmax_attention(q, k, v, causal=False)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(y.transpose(1, 2) for y in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    ).transpose(1, 2)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


OPERATORS: dict[str, Any] = {
    "linear_attention": lambda **options: hsp.linear_attention(Q, K, V, **options),
    "delta_rule": lambda **options: hsp.delta_rule(Q, K, V, beta=V[..., 0], **options),
    "softmax_attention": lambda **options: hsp.softmax_attention(Q, K, K, **options),
    "short_conv": lambda **options: hsp.short_conv(Q[..., 0], torch.ones(2, 3), **options),
    "token_shift": lambda **options: hsp.token_shift(Q[..., 0], **options),
}
PLAIN = [
    (kind, name)
    for kind in OPERATORS
    for name in inspect.signature(getattr(hsp, kind)).parameters
    if name in ("scale", "window", "causal", "normalize", "return_final_state", "activation", "backend", "shard")
]


@pytest.mark.parametrize(("kind", "name"), PLAIN)
def test_what_autograd_would_not_see_is_no_tensor(kind: str, name: str) -> None:
    """Learned or not: who means a constant can make it a number."""
    for value in (torch.nn.Parameter(torch.tensor(2.0)), torch.tensor(2.0, requires_grad=True), torch.tensor(2)):
        with pytest.raises(ValueError, match=rf"^{kind}: {name} must be .*, not a tensor, which would get no gradient"):
            OPERATORS[kind](**{name: value})


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "ulysses", "megatron", "ring_attention"])
def test_no_strategy_takes_a_scale_that_is_learned(strategy: str) -> None:
    for field, allowed in (("linear", strategy), ("softmax", "ring" if strategy == "ring_attention" else strategy)):
        shard = hsp.SequenceParallel(None, **{field: allowed}).shard(6)
        for causal in (True, False):
            kind = f"{field}_attention"
            OPERATORS[kind](shard=shard, causal=causal, scale=0.5)
            with pytest.raises(ValueError, match=f"{kind}: scale must be float . None, not a tensor"):
                OPERATORS[kind](shard=shard, causal=causal, scale=torch.nn.Parameter(torch.tensor(0.5)))


CALLS = {
    "none": lambda q, k, v, shard: hsp.linear_attention(q, k, v, shard=shard),
    "scalar": lambda q, k, v, shard: hsp.linear_attention(q, k, v, log_decay=-v.abs()[..., 0], shard=shard),
    "vector": lambda q, k, v, shard: hsp.linear_attention(q, k, v, log_decay=-v.abs(), shard=shard),
    "bonus": lambda q, k, v, shard: hsp.linear_attention(
        q, k, v, log_decay=-v.abs(), bonus=torch.ones(q.shape[2:]), shard=shard
    ),
    "delta": lambda q, k, v, shard: hsp.delta_rule(q, k, v, beta=v[..., 0].sigmoid(), shard=shard),
    "gated delta": lambda q, k, v, shard: hsp.delta_rule(
        q, k, v, beta=v[..., 0].sigmoid(), log_decay=-v.abs()[..., 1], shard=shard
    ),
    "kda": lambda q, k, v, shard: hsp.delta_rule(q, k, v, beta=v[..., 0].sigmoid(), log_decay=-v.abs(), shard=shard),
    "softmax": lambda q, k, v, shard: hsp.softmax_attention(q, k, v, shard=shard),
    "window": lambda q, k, v, shard: hsp.softmax_attention(q, k, v, window=REACH["window"], shard=shard),
    "conv": lambda q, k, v, shard: hsp.short_conv(
        (q + k + v).flatten(2), torch.ones(q.shape[2] * q.shape[3], REACH["conv"]), shard=shard
    ),
    "shift": lambda q, k, v, shard: hsp.token_shift((q + k + v).flatten(2), shard=shard),
}
REACH = {"window": 5, "conv": 4, "shift": 2}  # how many tokens see a token; the other operators carry it to the end


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("length", [1, 5, 64])
def test_inputs_are_not_written_to(kind: str, length: int) -> None:
    """One chunk, one batch row: the shapes at which a loaded block is a view of the input."""
    leaves = [torch.randn(1, length, 1, 4, requires_grad=True) for _ in range(3)]
    before = [leaf.detach().clone() for leaf in leaves]
    CALLS[kind](*leaves, None).sum().backward()
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))


def moved(group: Any, layout: str) -> None:
    """Change one token: nothing before it moves, by not a bit; it and later ones do, as far as the operator reaches."""
    length, changed = 37, 15
    shard = hsp.SequenceParallel(group, layout=layout, check="calls").shard(length)
    whole = [torch.randn(2, length, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    other = [y.clone() for y in whole]
    for y in other:
        y[:, changed] += 1.0
    for kind, call in CALLS.items():
        a, b = (shard.gather(call(*(shard.take(y) for y in inputs), shard)) for inputs in (whole, other))
        where = f"{kind} on rank {groups.rank(group)}"
        first, last = changed + (kind == "shift"), min(length, changed + REACH.get(kind, length))
        assert torch.equal(a[:, :first], b[:, :first]), f"{where}: a later token leaks into earlier ones"
        assert torch.equal(a[:, last:], b[:, last:]), f"{where}: a token is seen from further than it reaches"
        for t in (first, (first + last) // 2, last - 1):
            assert not torch.equal(a[:, t], b[:, t]), f"{where}: token {t} does not depend on token {changed}"


CUTS = tiered([(1, "contiguous"), (2, "zigzag")], [(1, "zigzag"), (2, "contiguous"), (4, "contiguous"), (4, "zigzag")])


@pytest.mark.parametrize(("world", "layout"), CUTS)
def test_leak_and_dependence(world: int, layout: str) -> None:
    run_ranks(moved, world, layout)


def kept_apart(group: Any, layout: str) -> None:
    """Change all of one document: no other document moves, by not a bit, and all of this one do."""
    length, bounds = 37, [0, 1, 9, 10, 30, 37]
    shard = hsp.SequenceParallel(group, layout=layout, check="calls").shard(length, bounds)
    whole = [torch.randn(1, length, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for start, end in itertools.pairwise(bounds):
        other = [y.clone() for y in whole]
        for y in other:
            y[:, start:end] += 1.0
        for kind, call in CALLS.items():
            a, b = (shard.gather(call(*(shard.take(y) for y in inputs), shard)) for inputs in (whole, other))
            where = f"{kind} on rank {groups.rank(group)}, document {start} to {end}"
            same = (a == b).all(-1).flatten(2).all(2)[0] if a.ndim == 4 else (a == b).all(-1)[0]
            assert same[:start].all() and same[end:].all(), f"{where} leaks into another"
            assert not same[start + (kind == "shift") : end].any(), f"{where} does not see itself"


@pytest.mark.parametrize(("world", "layout"), CUTS)
def test_documents_do_not_leak(world: int, layout: str) -> None:
    run_ranks(kept_apart, world, layout)


@pytest.mark.parametrize("kind", CALLS)
def test_packed_documents_are_one_row(kind: str) -> None:
    shard = hsp.SequenceParallel(None).shard(6, [0, 2, 6])
    with pytest.raises(ValueError, match="packed documents .* batch is 2"):
        CALLS[kind](*(torch.ones(2, 6, 2, 4) for _ in range(3)), shard)


def with_empty_documents(group: Any, layout: str) -> None:
    """Outputs and gradients are those of the documents that have tokens."""
    sp = hsp.SequenceParallel(group, layout=layout, check="calls")
    for full, bounds in (((0, 5, 23), (0, 0, 5, 5, 23, 23)), ((0, 23), (0, 0, 0, 23)), ((0, 12, 23), (0, 12, 12, 23))):
        for kind, call in CALLS.items():
            results = []
            for documents in (full, bounds):
                shard = sp.shard(23, documents)
                make = torch.Generator().manual_seed(0)
                leaves = [torch.randn(1, 23, 2, 4, dtype=torch.float64, generator=make) for _ in range(3)]
                local = [shard.take(leaf).requires_grad_() for leaf in leaves]
                o = shard.gather(call(*local, shard))
                results.append((o, *torch.autograd.grad((o * o).sum(), local)))
            for want, got in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-12, msg=f"{kind} {bounds}")


@pytest.mark.parametrize(("world", "layout"), CUTS)
def test_empty_documents_change_nothing(world: int, layout: str) -> None:
    run_ranks(with_empty_documents, world, layout)
