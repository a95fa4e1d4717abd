"""The delta rule with several tokens in the place of each token of the sequence, which no cut parts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives
from hybrid_sp.shard import LAYOUTS
from tests.support.oracle import assert_close, delta_rule_loop
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

LENGTH, STEPS, G, H, K, V = 47, 3, 2, 4, 5, 3
DOCUMENTS = (0, 1, 20, 21, LENGTH)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    by_token = (1, STEPS * LENGTH)
    return {
        "q": torch.randn(*by_token, G, K, dtype=torch.float64),
        "k": F.normalize(torch.randn(*by_token, G, K, dtype=torch.float64), dim=-1),
        "v": torch.randn(*by_token, H, V, dtype=torch.float64),
        "beta": 2 * torch.rand(*by_token, H, dtype=torch.float64),
        "log_decay": F.logsigmoid(3 + torch.randn(*by_token, H, dtype=torch.float64)),
    }


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def wanted(documents: tuple[int, ...]) -> dict[str, Tensor]:
    """By the loop over all tokens of one document after another."""
    x = leaves(inputs())
    outputs = [
        delta_rule_loop(**{name: part[:, STEPS * a : STEPS * b] for name, part in x.items()})
        for a, b in itertools.pairwise(documents)
    ]
    o, S = torch.cat([one for one, _ in outputs], 1), outputs[-1][1]
    (o.square().sum() + S.sum()).backward()
    return {"o": o.detach(), "S": S.detach()} | {f"d {name}": leaf.grad for name, leaf in x.items()}


def compare(group: Any) -> None:
    for layout, documents in itertools.product(LAYOUTS, (None, DOCUMENTS)):
        sp = hsp.SequenceParallel(group, layout=layout, check="calls")
        shard = sp.shard(LENGTH, documents)
        want = wanted(documents or (0, LENGTH))

        def own(x: Tensor, shard: hsp.Shard = shard) -> Tensor:
            return shard.take(x.unflatten(1, (LENGTH, STEPS))).flatten(1, 2)

        x = leaves({name: own(whole) for name, whole in inputs().items()})
        o, S = hsp.delta_rule(**x, steps=STEPS, shard=shard, return_final_state=True)
        (o.square().sum() + S.sum() / sp.size).backward()
        where = f"{layout}, {documents}, rank {sp.rank} of {sp.size}"
        assert_close(f"{where}: o", o, own(want["o"]), 1e-10)
        assert_close(f"{where}: S", S, want["S"], 1e-10)
        for name, leaf in x.items():
            assert_close(f"{where}: d {name}", leaf.grad, own(want[f"d {name}"]), 1e-10)
        total = collectives.all_reduce(torch.tensor(float(o.shape[1])), group, tag="tokens")
        assert total == STEPS * LENGTH


@pytest.mark.parametrize("ranks", tiered([3], [1, 2, 4]))
def test_parity(ranks: int) -> None:
    run_ranks(compare, ranks)


def test_one_token_at_a_time_from_a_state() -> None:
    x = inputs()
    whole, want = hsp.delta_rule(**x, return_final_state=True)
    S, outputs = torch.zeros(1, H, K, V, dtype=torch.float64), []
    for t in range(LENGTH):
        part = {name: tensor[:, STEPS * t : STEPS * (t + 1)] for name, tensor in x.items()}
        o, S = hsp.delta_rule(**part, steps=STEPS, initial_state=S, return_final_state=True)
        outputs.append(o)
    assert_close("o", torch.cat(outputs, 1), whole, 1e-10)
    assert_close("S", S, want, 1e-10)


def test_no_cut_parts_the_steps_of_a_token() -> None:
    shard = hsp.SequenceParallel(None).shard(LENGTH, DOCUMENTS)
    long = shard.stretched(STEPS)
    assert long.length == STEPS * LENGTH and long.boundaries == tuple(STEPS * one for one in shard.boundaries)
    assert long.calls is shard.calls and long.stretched(2).unit == 6
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        hsp.delta_rule(**inputs(), steps=0)
