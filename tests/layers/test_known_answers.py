"""Known answers without training, on ranks: what states track, by weights made by hand, and what they recall."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hybrid_sp as hsp
from hybrid_sp.shard import LAYOUTS
from layers.registry import BlockContext, mixer_spec
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

LENGTH = 203
ON, OFF, HALF = 60.0, -60.0, 0.0  # logits of a beta of 2, 0 and 1


def built(name: str, dim: int, heads: int, **options: Any) -> nn.Module:
    """A mixer of zeros, whose output is that of its heads."""
    context = BlockContext(dim=dim, heads=heads, kv_heads=heads, layer=0, depth=1, norm_eps=1e-12, rope_base=1e4)
    mixer = mixer_spec(name, conv=0, negative_eigenvalues=True, **options).build(context).double()
    with torch.no_grad():
        for name, weight in mixer.named_parameters():
            weight.fill_(1.0 if name == "norm.weight" else 0.0)
        mixer.output.weight.copy_(torch.eye(*mixer.output.weight.shape))
    return mixer


def parity_mixer() -> nn.Module:
    """Tokens are begin, 0 and 1, each a channel. The first writes 1; a 1 reflects the state at its only key."""
    mixer = built("delta_net", 3, 1, head_dim=1)
    q, k, v = mixer.project.linear.weight.data.split(1)
    q.fill_(1.0), k.fill_(1.0)
    v.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
    mixer.rule.beta.weight.data.copy_(torch.tensor([[HALF, OFF, ON]]))
    return mixer


PERMUTATIONS = [*itertools.permutations(range(3))]


def swaps_of(order: tuple[int, ...]) -> list[tuple[int, int]]:
    """At most two swaps of places that put place order[i] into i."""
    swaps, rest = [], [*range(3)]
    for i in range(3):
        if rest[i] != order[i]:
            j = rest.index(order[i])
            swaps.append((i, j))
            rest[i], rest[j] = rest[j], rest[i]
    return swaps


def permutation_mixer() -> nn.Module:
    """Tokens are begin and six permutations. The first writes (-1, 1), (0, 1) and (1, 1) under the three keys, in two
    orthogonal writes; the others swap rows of the state, a reflection each. Head i reads key i."""
    mixer = built("gated_delta_product", 7, 3, head_dim=6, expand_k=0.5, expand_v=1 / 3)
    q, k, v, gate = (
        rows.view(-1, 3, n, 7)
        for rows, n in zip(mixer.project.linear.weight.data.split([9, 18, 12, 6]), (3, 3, 2, 2), strict=True)
    )
    beta = mixer.rule.write.beta.weight.data.view(2, 3, 7)
    q.copy_(torch.eye(3)[None, :, :, None].expand_as(q))
    gate.fill_(1.0)
    mixer.rule.write.steps.A_log.data.fill_(-60.0)  # no decay
    begin = torch.tensor([[-1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    for write in range(2):
        k[write, :, :, 0] = begin[write]
        v[write, :, write, 0] = begin[write].norm()
        beta[write, :, 0] = HALF
        for token, order in enumerate(PERMUTATIONS, start=1):
            swaps = swaps_of(order)
            beta[write, :, token] = ON if write < len(swaps) else OFF
            k[write, :, 0, token] = 1.0
            if write < len(swaps):
                one, other = swaps[write]
                k[write, :, :, token] = torch.eye(3)[one] - torch.eye(3)[other]
    return mixer


def tokens_of(kinds: int, documents: tuple[int, ...]) -> Tensor:
    """Random tokens 1 ... kinds, and 0 at the begin of each document."""
    text = torch.randint(1, kinds + 1, (LENGTH,), generator=torch.Generator().manual_seed(0))
    text[list(documents[:-1])] = 0
    return text


def tracked(text: Tensor, documents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The sign that each bit leaves, and what the places hold after each permutation."""
    signs, places = [], []
    for begin, end in itertools.pairwise(documents):
        sign, held = 1.0, [-1.0, 0.0, 1.0]
        for token in text[begin:end].tolist():
            sign = -sign if token == 2 else sign
            held = [held[i] for i in PERMUTATIONS[token - 1]] if token else held
            signs.append(sign), places.append(held)
    return torch.tensor(signs), torch.tensor(places)


def compare(group: Any) -> None:
    for layout, documents in itertools.product(LAYOUTS, ((0, LENGTH), (0, 1, 60, 61, LENGTH))):
        shard = hsp.SequenceParallel(group, layout=layout).shard(LENGTH, documents)
        bits, moves = tokens_of(2, documents), tokens_of(6, documents)
        y, _ = parity_mixer()(shard.take(torch.eye(3, dtype=torch.float64)[bits][None]), shard)
        assert torch.equal(y[0, :, 0].round(), shard.take(tracked(bits, documents)[0].double(), dim=0))
        y, _ = permutation_mixer()(shard.take(torch.eye(7, dtype=torch.float64)[moves][None]), shard)
        value, one = y[0, :, :6].unflatten(-1, (3, 2)).unbind(-1)
        got = (value / one).round()
        assert torch.equal(got, shard.take(tracked(moves, documents)[1].double(), dim=0)), f"{layout} {documents}"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parity_and_permutations_of_three_are_tracked(ranks: int) -> None:
    """By reflections: beta 2 is an eigenvalue of -1, and a permutation of three is a product of two swaps."""
    run_ranks(compare, ranks)


def test_permutations_that_one_reflection_cannot_make() -> None:
    assert [len(swaps_of(order)) for order in PERMUTATIONS] == [0, 1, 1, 2, 2, 1]


K, WORDS, DRAWS = 32, 64, 20  # channels of keys and values, values to choose from, and repetitions


def recalled(answers: Tensor, words: Tensor, wanted: Tensor) -> float:
    """The share of answers [draws, n, K] that are nearest to the wanted word."""
    return (torch.einsum("bnk,bwk->bnw", answers, words).argmax(-1) == wanted).double().mean().item()


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def ask(group: Any, keys: Tensor, values: Tensor, questions: Tensor) -> dict[str, Tensor]:
    """Write every key and value, then ask for each question: by sums, by the delta rule and by softmax."""
    count = questions.shape[1]
    q = F.pad(questions, (0, 0, keys.shape[1], 0))
    k, v = (F.pad(x, (0, 0, 0, count)) for x in (keys, values))
    writes = (torch.arange(q.shape[1]) < keys.shape[1]).double()[None, :, None].expand(len(q), -1, 1)
    shard = hsp.SequenceParallel(group, layout="zigzag").shard(q.shape[1])
    q, k, v = (shard.take(x)[:, :, None] for x in (q, k, v))
    outputs = {
        "sum": hsp.linear_attention(q, k, v, scale=1.0, shard=shard),
        "delta": hsp.delta_rule(q, k, v, beta=shard.take(writes), scale=1.0, shard=shard),
        "softmax": hsp.softmax_attention(q, k, v, scale=32.0, shard=shard),
    }
    return {name: shard.gather(o)[:, -count:, 0] for name, o in outputs.items()}


def compare_recall(group: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for pairs, by_sum in ((16, 1.0), (32, 0.967), (64, 0.785), (128, 0.498)):
        words, keys = unit(generator, DRAWS, WORDS, K), unit(generator, DRAWS, pairs, K)
        wanted = torch.randint(WORDS, (DRAWS, pairs), generator=generator)
        answers = ask(group, keys, torch.stack([one[at] for one, at in zip(words, wanted, strict=True)]), keys)
        assert recalled(answers["sum"], words, wanted) == pytest.approx(by_sum, abs=0.04), pairs
        assert recalled(answers["softmax"], words, wanted) > 0.99, pairs


def compare_overwriting(group: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(DRAWS, K, K, generator=generator, dtype=torch.float64))[0]
    words = unit(generator, DRAWS, WORDS, K)
    first, last = (torch.randint(WORDS, (DRAWS, K), generator=generator) for _ in range(2))
    at = torch.cat([first, last], 1)
    values = torch.stack([one[place] for one, place in zip(words, at, strict=True)])
    answers = ask(group, torch.cat([keys, keys], 1), values, keys)
    assert recalled(answers["delta"], words, last) == 1.0
    assert 0.45 < recalled(answers["sum"], words, last) < 0.59


@pytest.mark.parametrize("ranks", tiered([1, 3], [2, 4]))
def test_recall_and_overwriting_of_random_pairs(ranks: int) -> None:
    """A sum of 32 x 32 numbers recalls fewer of more random pairs, softmax all; where each of 32 orthogonal keys is
    written twice the delta rule answers with the last value, and a sum with either."""
    run_ranks(compare_recall, ranks)
    run_ranks(compare_overwriting, ranks)
