"""Mixers with the sequence cut over ranks, against one device in float64, on every rank: a batch, and packed documents,
each of which is as if alone, exactly where it can be."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives
from hybrid_sp.shard import LAYOUTS
from tests.layers.cases import CASES, CONTEXT, Case, tokens
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

# Of a sequence shorter than a chunk, whose spans are shorter than a convolution reaches, and of a longer one; documents
# of one token, and of more than a span and a chunk.
LENGTHS = {11: (0, 1, 2, 7, 11), 137: (0, 1, 4, 5, 60, 61, 137)}
IN_TURN = [*zip(CASES, itertools.cycle(LAYOUTS), strict=False)]  # every mixer in one layout
IN_BOTH = [*itertools.product(CASES, LAYOUTS)]


@pytest.mark.parametrize(("ranks", "rows"), [(2, "batch"), (3, "packed")])
def test_mixers_agree_with_one_device(ranks: int, rows: str) -> None:
    """Every mixer, at one length and in one layout, by turns."""
    turns = itertools.cycle(itertools.product(LAYOUTS, LENGTHS if rows == "batch" else [*LENGTHS][::-1]))
    cases = [(number, *turn) for number, turn in zip(range(len(CASES)), turns, strict=False)]
    check_mixers(ranks, rows, cases)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["batch", "packed"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_mixers_agree_with_one_device_in_every_case(ranks: int, rows: str) -> None:
    check_mixers(ranks, rows, [*itertools.product(range(len(CASES)), LAYOUTS, LENGTHS)])


@pytest.mark.slow
def test_a_few_mixers_agree_on_eight_ranks() -> None:
    check_mixers(8, "packed", [*itertools.product(range(2, len(CASES), 4), LAYOUTS, [137])])


def check_mixers(ranks: int, rows: str, cases: list[tuple[int, str, int]]) -> None:
    """Cases of a number in CASES, a layout and a length; on one device and on ranks."""
    packed = rows == "packed"
    given = [(CASES[i], layout, length, wanted(i, length, packed)) for i, layout, length in cases]
    run_ranks(compare_mixers, ranks, given, packed, deadline=600.0)


@functools.cache
def wanted(number: int, length: int, packed: bool) -> dict[str, Tensor]:
    """The tensors of one device."""
    bounds = LENGTHS[length] if packed else (0, length)
    return one_by_one(CASES[number], *random_pair(length, packed), bounds)


def compare_mixers(group: Any, cases: list[tuple[Case, str, int, dict[str, Tensor]]], packed: bool) -> None:
    """Output, input gradient and parameter gradients, summed over ranks."""
    for case, layout, length, want in cases:
        x, dy = random_pair(length, packed)
        sp = hsp.SequenceParallel(group, layout=layout, check="calls")
        shard = sp.shard(length, LENGTHS[length] if packed else None)
        got = measured(case, shard.take(x), shard.take(dy), shard)
        where = f"{case}, {length} tokens, {layout}, rank {sp.rank} of {sp.size}"
        for name, tensor in got.items():
            if name in ("y", "dx"):
                assert_close(f"{where}: {name}", tensor, shard.take(want[name]), 1e-10)
            else:
                total = collectives.all_reduce(tensor, group, tag="gradients")
                assert_close(f"{where}: {name}", total, want[name], 1e-10)


def random_pair(length: int, packed: bool, seed: int = 2) -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output, of one row if documents are packed and else of two."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, 1 if packed else 2, length, CONTEXT.dim, generator=generator, dtype=torch.float64)
    return x, dy


def measured(
    case: Case, x: Tensor, dy: Tensor, shard: hsp.Shard | None = None, rounded_to: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output and gradients in the dtype of x, x and dy being this rank's tokens; of weights rounded to a dtype."""
    mixer = case.build(rounded_to or x.dtype).to(x.dtype)
    x = x.detach().requires_grad_()
    y, _ = mixer(x, shard)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad} | {f"d {name}": weight.grad for name, weight in mixer.named_parameters()}


def one_by_one(case: Case, x: Tensor, dy: Tensor, bounds: tuple[int, ...]) -> dict[str, Tensor]:
    """The same of documents that one device reads one after the other."""
    parts = [measured(case, x[:, a:b], dy[:, a:b]) for a, b in itertools.pairwise(bounds)]
    return {
        name: torch.cat(tensors, dim=1) if name in ("y", "dx") else torch.stack(tensors).sum(0)
        for name, tensors in ((name, [part[name] for part in parts]) for name in parts[0])
    }


@pytest.mark.parametrize("first", tiered([0], [1, 2, 3, 4]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_at_most_twice_that_of_one_device(dtype: torch.dtype, first: int) -> None:
    run_ranks(compare_rounding, 2, dtype, CASES[first::5], deadline=600.0)


def compare_rounding(group: Any, dtype: torch.dtype, cases: list[Case]) -> None:
    """Errors against float64 on the same rounded numbers, rms over seeds: of the output, of the input's gradient, and
    of all parameters' gradients together, since the rounding of a few numbers alone is a lottery."""
    length, seeds = max(LENGTHS), 4
    shard = hsp.SequenceParallel(group, layout="zigzag", check="calls").shard(length)
    for case in cases:
        squares = torch.zeros(3, 2, dtype=torch.float64)  # y, dx, parameters; here, one device
        for seed in range(seeds):
            x, dy = random_pair(length, packed=False, seed=seed)
            want = measured(case, x.to(dtype).double(), dy.to(dtype).double(), rounded_to=dtype)
            alone = measured(case, x.to(dtype), dy.to(dtype))
            here = measured(case, shard.take(x).to(dtype), shard.take(dy).to(dtype), shard)
            for name, truth in want.items():
                place = {"y": 0, "dx": 1}.get(name, 2)
                if place < 2:
                    miss = (here[name].double() - shard.take(truth)).square().sum()
                    collectives.all_reduce(miss, group, tag="errors")
                else:
                    total = collectives.all_reduce(here[name].to(torch.float32), group, tag="gradients")
                    miss = (total.double() - truth).square().sum()
                both = torch.stack([miss, (alone[name].double() - truth).square().sum()])
                squares[place] += both / truth.square().sum()
        for name, (miss, single) in zip(("y", "dx", "parameters"), squares.sqrt().tolist(), strict=True):
            assert miss <= 2 * single, f"{case} {dtype} {name}: {miss:.2e}, one device {single:.2e}"


@pytest.mark.parametrize(("ranks", "documents"), tiered([(2, (3,))], [(1, (1, 3, 5)), (3, (1, 3, 5))]))
def test_nothing_leaks_from_one_document_into_another(ranks: int, documents: tuple[int, ...]) -> None:
    """Every mixer in one layout and one document, or in both and several."""
    cases = IN_TURN if len(documents) == 1 else IN_BOTH
    run_ranks(change_documents, ranks, cases, documents, deadline=600.0)


def change_documents(group: Any, cases: list[tuple[Case, str]], documents: tuple[int, ...]) -> None:
    """Another text in one document leaves every bit of all others, of the output and of the input's gradient; and a
    gradient that comes to one document alone goes to no other."""
    length, bounds = max(LENGTHS.items())
    x, dy = random_pair(length, packed=True)
    for case, layout in cases:
        shard = hsp.SequenceParallel(group, layout=layout, check="calls").shard(length, bounds)
        before = measured(case, shard.take(x), shard.take(dy), shard)
        for document in documents:
            span = slice(bounds[document], bounds[document + 1])
            inside_L = torch.zeros(length, dtype=torch.bool)
            inside_L[span] = True
            inside_T = shard.take(inside_L, dim=0)
            changed, only = x.clone(), torch.zeros_like(dy)
            changed[:, span] += 1
            only[:, span] = dy[:, span]
            where = f"{case}, document {document}, {layout}, rank {shard.sp.rank} of {shard.sp.size}"
            after = measured(case, shard.take(changed), shard.take(dy), shard)
            alone = measured(case, shard.take(x), shard.take(only), shard)
            for name in ("y", "dx"):
                assert torch.equal(after[name][:, ~inside_T], before[name][:, ~inside_T]), f"{where}: {name} leaks"
            assert (after["y"][:, inside_T] != before["y"][:, inside_T]).any(-1).all(), f"{where}: nothing changes"
            assert not alone["dx"][:, ~inside_T].any(), f"{where}: a gradient leaks"


@pytest.mark.parametrize("ranks", tiered([2], [4]))
def test_a_token_is_seen_by_later_ranks_and_by_none_before_it(ranks: int) -> None:
    run_ranks(change_a_token, ranks, IN_TURN if ranks == 2 else IN_BOTH, deadline=180.0)


def change_a_token(group: Any, cases: list[tuple[Case, str]]) -> None:
    """What a token changes is what it changes on one device; before it, and on every rank, exactly nothing."""
    length = max(LENGTHS)
    for case, layout in cases:
        mixer = case.build()
        shard = hsp.SequenceParallel(group, layout=layout, check="calls").shard(length)
        x = tokens(length)
        y, y_T = mixer(x)[0].detach(), mixer(shard.take(x), shard)[0].detach()
        global_T = torch.cat([torch.arange(a, b) for a, b in shard.spans])
        for token in (shard.bounds[1] - 1, shard.bounds[-2] - 2):  # one span and the next; over a span's border
            changed = x.clone()
            changed[:, token] += 1
            change = mixer(changed)[0].detach() - y
            change_T = mixer(shard.take(changed), shard)[0].detach() - y_T
            where = f"{case}, token {token}, {layout}, rank {shard.sp.rank} of {shard.sp.size}"
            assert not change_T[:, global_T < token].any(), f"{where} leaks into the past"
            near_T = (global_T >= token) & (global_T < token + 3)  # as far as every mixer's memory is not rounding
            assert_close(where, change_T[:, near_T], shard.take(change)[:, near_T], 1e-9)
