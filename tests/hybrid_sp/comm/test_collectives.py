"""The ledger: calls and bytes are what DESIGN section 3 says, and do not grow with the sequence."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hybrid_sp as hsp
from hybrid_sp.comm import collectives, groups
from hybrid_sp.comm.pending import CommunicationError, Header
from hybrid_sp.mesh import LAUNCHER, whole_group
from tests.support.impatience import MOMENT, timeout_of
from tests.support.ranks import run_ranks

H, G, K, V, B = 4, 2, 8, 6, 2
Counts = dict[str, list[int]]


def linear_counts(
    group: Any, layout: str, decay: str, length: int, normalize: bool, final: bool, exchange: str = "all_gather"
) -> Counts:
    """Bytes of each collective or message, by direction, of one linear layer."""
    shard = hsp.SequenceParallel(group, layout=layout, linear=exchange).shard(length)
    T = shard.tokens
    shapes = {"fixed": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}
    q, k = (torch.rand(B, T, G, K, requires_grad=True) for _ in "qk")
    v = torch.rand(B, T, H, V, requires_grad=True)
    g = (-torch.rand(shapes[decay])).requires_grad_() if decay in shapes else None
    with hsp.ledger() as book:
        if decay == "delta":
            out = hsp.delta_rule(q, k / K, v, beta=torch.rand(B, T, H), shard=shard)
        else:
            out = hsp.linear_attention(q, k, v, log_decay=g, shard=shard, normalize=normalize, return_final_state=final)
        loss = out[0].sum() + out[1].sum() if final and not normalize else (out[0] if final else out).sum()
        loss.backward()
    used = "all_gather" if exchange == "all_gather" else "message"
    assert {row.collective for row in book.rows} <= {used} and {row.tag for row in book.rows} <= {"linear"}
    assert book.calls == len(book.rows) and book.bytes == sum(row.bytes for row in book.rows)
    return {d: [row.bytes for row in book.select(direction=d)] for d in ("forward", "backward")}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    ("decay", "transition"), [("none", 0), ("fixed", 0), ("scalar", 1), ("vector", K), ("delta", K * K)]
)
def test_a_linear_layer_is_one_gather_each_way_of_constant_size(layout: str, decay: str, transition: int) -> None:
    spans = 1 if layout == "contiguous" else 2
    for world in (2, 4):
        forward = (world - 1) * spans * B * H * (K * V + transition) * 4
        backward = (world - 1) * spans * B * H * K * V * 4
        want = {"forward": [forward], "backward": [backward]}
        for length in (1024, 4096, 16384) if (world, layout) == (2, "contiguous") else (64,):
            assert run_ranks(linear_counts, world, layout, decay, length, False, False) == [want] * world


def test_a_final_state_and_a_normaliser_add_what_they_must() -> None:
    each = B * H * 4
    plain = run_ranks(linear_counts, 3, "contiguous", "scalar", 40, False, True)
    assert plain == [{"forward": [2 * each * (K * V + 1)], "backward": [2 * each * 2 * K * V]}] * 3
    normalised = run_ranks(linear_counts, 3, "contiguous", "scalar", 40, True, False)
    assert normalised == [{"forward": [2 * each * (K * V + K + 1)], "backward": [2 * each * (K * V + K)]}] * 3


def bidirectional_counts(group: Any) -> Counts:
    shard = hsp.SequenceParallel(group, layout="zigzag").shard(40)
    q, v = (torch.randn(B, shard.tokens, H, dim, requires_grad=True) for dim in (K, V))
    with hsp.ledger() as book:
        out = hsp.linear_attention(q, q, v, shard=shard, causal=False)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()
    return {d: [row.bytes for row in book.select(direction=d)] for d in ("forward", "backward")}


def test_without_a_mask_one_state_per_rank_travels_each_way() -> None:
    each = 2 * B * H * K * V * 4
    assert run_ranks(bidirectional_counts, 3) == [{"forward": [each], "backward": [each]}] * 3


def softmax_counts(group: Any, layout: str, length: int, dtype: torch.dtype) -> list[tuple[str, str, str, int]]:
    shard = hsp.SequenceParallel(group, layout=layout).shard(length)
    q = torch.randn(B, shard.tokens, H, K, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(B, shard.tokens, G, K, dtype=dtype, requires_grad=True) for _ in "kv")
    with hsp.ledger() as book:
        hsp.softmax_attention(q, k, v, shard=shard).sum().backward()
    return [(row.collective, row.tag, row.direction, row.bytes) for row in book.rows]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_softmax_layer_gathers_before_heads_are_repeated(layout: str, dtype: torch.dtype) -> None:
    for world, length, longest in ((2, 32, 16), (3, 32, 11 if layout == "contiguous" else 11)):
        numbers = 2 * (world - 1) * B * longest * G * K
        assert (
            run_ranks(softmax_counts, world, layout, length, dtype)
            == [
                [
                    ("all_gather", "softmax", "forward", numbers * dtype.itemsize),
                    ("reduce_scatter", "softmax", "backward", numbers * 4),
                ]
            ]
            * world
        )


def test_one_device_communicates_nothing() -> None:
    assert linear_counts(None, "zigzag", "scalar", 20, False, True) == {"forward": [], "backward": []}
    assert softmax_counts(None, "zigzag", 20, torch.float32) == []


def basic_forms(group: Any) -> None:
    rank, ranks = groups.rank(group), groups.size(group)
    x = torch.full((2, 3), float(rank + 1))
    assert collectives.all_gather(x, group, tag="test")[:, 0, 0].tolist() == [r + 1.0 for r in range(ranks)]
    header = Header(tag="test", check=True)
    rows = torch.arange(ranks * 2.0).view(ranks, 2) * (rank + 1)
    total = sum(range(1, ranks + 1))
    scattered = collectives.start_reduce_scatter(rows, group, header).wait()
    assert scattered.tolist() == [2 * rank * total, (2 * rank + 1) * total]
    assert collectives.all_reduce(x, group, tag="test")[0, 0].item() == total
    assert collectives.broadcast(torch.tensor([rank]), group, src=ranks - 1).item() == ranks - 1
    assert collectives.gather_objects({"rank": rank}, group) == [{"rank": r} for r in range(ranks)]
    collectives.barrier(group)


def all_to_all(group: Any, dtype: torch.dtype, layout: str) -> tuple[int, int]:
    """Rank a sends a + 2 b rows, of its number and b's, to rank b; the bytes that it receives, and how often."""
    me, ranks = groups.rank(group), range(groups.size(group))
    sent, received = [me + 2 * other for other in ranks], [other + 2 * me for other in ranks]
    x = torch.tensor([[[me, other]] for other in ranks for _ in range(sent[other])], dtype=dtype).view(-1, 1, 2)
    if layout == "strided":
        x = x.repeat(1, 3, 1)[:, 1:2]
    with hsp.ledger() as book:
        pending = collectives.start_all_to_all(x, sent, received, group, Header(tag="test", check=True))
        got = pending.wait()
    assert got.dtype == dtype
    assert got.tolist() == [[[other, me]] for other in ranks for _ in range(received[other])]
    return book.bytes, book.calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_all_to_all_of_uneven_and_empty_parts(dtype: torch.dtype, layout: str) -> None:
    row = 2 * dtype.itemsize
    assert run_ranks(all_to_all, 3, dtype, layout) == [(row * n, 1) for n in (3, 6, 9)]
    assert run_ranks(all_to_all, 1, dtype, layout) == [(0, 0)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_basic_forms(world: int) -> None:
    run_ranks(basic_forms, world)


def missing(_: Any) -> str:
    """What rank 0 says where rank 1 does not come to the second call before that."""
    asked = timedelta(minutes=7)
    group = hsp.init_mesh(dp=1, sp=2, timeout=asked)["sp"].get_group()
    assert timeout_of(group) == timeout_of(groups.message_group(group)) == asked
    shard, q = hsp.SequenceParallel(group).shard(8), torch.randn(1, 4, 2, 4)
    hsp.linear_attention(q, q, q, shard=shard)
    said = ""
    if dist.get_rank() == 0:
        dist.distributed_c10d._set_pg_timeout(MOMENT, group)
        with pytest.raises(CommunicationError) as caught:
            hsp.linear_attention(q, q, q, shard=shard)
        said = str(caught.value)
    dist.barrier()
    return said


def test_a_rank_that_does_not_come_is_a_timeout_that_names_the_collective() -> None:
    said, _ = run_ranks(missing, 2)
    assert said.startswith("rank 0 failed in: all_gather linear forward call 1 "), said


def strided_mesh(group: Any) -> tuple[list[int], list[int], int]:
    mesh = hsp.init_mesh(dp=2, sp=2)
    assert [mesh[axis].get_group().group_desc for axis in ("dp", "sp")] == ["dp", "sp"]
    twin = groups.message_group(mesh["sp"].get_group())
    assert twin.group_desc.startswith("sp, twin on "), "a watchdog tells which group is stuck"
    assert whole_group(mesh) is dist.group.WORLD
    members = [dist.get_process_group_ranks(mesh[axis].get_group()) for axis in ("dp", "sp")]
    return members[0], members[1], mesh.size()


def test_mesh_axes() -> None:
    assert run_ranks(strided_mesh, 4) == [
        ([0, 2], [0, 1], 4),
        ([1, 3], [0, 1], 4),
        ([0, 2], [2, 3], 4),
        ([1, 3], [2, 3], 4),
    ]
    with pytest.raises(ValueError, match="got dp=1, sp=2 for 1 processes"):
        hsp.init_mesh(dp=1, sp=2)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 set in the environment, RANK, MASTER_ADDR, MASTER_PORT missing"),
        ({"RANK": "0"}, "RANK=0 set in the environment, WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"}, "MASTER_ADDR missing"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": ""}, "MASTER_PORT missing"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}, "RANK must be one of 0 to WORLD"),
        ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}, "got RANK=0 WORLD_SIZE=two"),
    ],
)
def test_half_of_what_a_launcher_sets(given: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=f"^init_mesh: .*{told}.*: start with torchrun .*, or unset RANK and WORLD_SIZE"
    ):
        hsp.init_mesh(sp=2)


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "1"}, {"MASTER_ADDR": "localhost", "RANK": ""}])
def test_one_process_without_a_launcher(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With WORLD_SIZE=1 and no RANK too: there is one rank that it can be."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    try:
        assert hsp.init_mesh().size() == 1
    finally:
        dist.destroy_process_group()
