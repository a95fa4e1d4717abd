"""Operators at random: lengths, documents, heads, windows, chunk sizes and numbers of ranks that nobody chose."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hybrid_sp.exchange import EXCHANGES
from tests.hybrid_sp.cases import Case, truth
from tests.hybrid_sp.ops.test_parity import check_cases
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

SEEDS = range(8)
CASES = 24  # of one seed


def random_case(draw: random.Random) -> Case:
    length = draw.choice([8, 9, 13, 17, 33, 40, 70])
    documents = None
    if draw.random() < 0.6:
        inner = draw.sample(range(1, length), draw.randint(0, 5) if draw.random() < 0.8 else length - 1)
        documents = (0, *sorted(inner), length)
    options: dict[str, Any] = {"length": length, "documents": documents, "seed": draw.randrange(1000)}
    options |= {"layout": draw.choice(["contiguous", "zigzag"]), "overlap": draw.random() < 0.7}
    options["operator"] = draw.choice(["linear", "linear", "delta", "softmax", "conv", "shift"])
    if options["operator"] in ("linear", "delta"):
        options |= {"groups": draw.choice([1, 2, 4]), "decay": draw.choice([None, "scalar", "vector"])}
        options["linear"] = draw.choice([*EXCHANGES, "auto"])
    if options["operator"] == "linear":
        options |= {"bonus": draw.random() < 0.3, "normalize": draw.random() < 0.3}
        if draw.random() < 0.2:
            options["decay"] = "fixed"
        if options["decay"] != "vector" and not options["bonus"] and draw.random() < 0.25:
            return Case(**options | {"linear": "ring_attention"})
        if documents is None and draw.random() < 0.2:
            return Case(**options | {"causal": False, "decay": None, "bonus": False})
    if options["operator"] == "softmax":
        options |= {"groups": draw.choice([1, 2, 4]), "causal": draw.random() < 0.7}
        options |= {"kv_heads_per_gather": draw.choice([None, 1, 2, 3]), "keep_kv": draw.random() < 0.5}
        options["softmax"] = draw.choice(["all_gather", "all_gather", "ring"])
        if options["causal"]:
            options["window"] = draw.choice([None, 2, 3, 5, 8, 20, 100])
        return Case(**options)
    if options["operator"] == "conv":
        options |= {"width": draw.choice([2, 3, 4, 7, 12]), "bias": draw.random() < 0.5}
    return Case(**options, states=draw.random() < 0.5)


@pytest.mark.parametrize("seed", tiered(SEEDS[:4], SEEDS[4:]))
def test_random_calls_are_the_token_loop(seed: int) -> None:
    draw = random.Random(seed)
    world, chunk, rows = draw.randint(1, 4), draw.choice([1, 2, 4, 8, 64]), draw.choice([1, 64, 8192])
    cases = [random_case(draw) for _ in range(CASES)]
    run_ranks(check_cases, world, [(case, truth(case)) for case in cases], chunk, rows, deadline=120)
