"""The growth of every linear mixer: does a token of a long sequence cost more, forward and backward on one device?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from analysis.bench.result import Result, growth
from analysis.bench.sizes import Sizes
from analysis.bench.stopwatch import THREADS, Timed, time_in_turns
from analysis.tables import Table
from layers.registry import MIXERS, BlockContext, mixer_spec

CONTEXT = BlockContext(dim=256, heads=4, kv_heads=4, layer=0, depth=8, norm_eps=1e-6, rope_base=10000.0)


def mixers(sizes: Sizes, out: Path) -> Result:
    """Time every linear mixer at a short and at a long sequence."""
    lengths = (sizes.lengths[0], sizes.lengths[-1])
    names = [name for name in sorted(MIXERS) if MIXERS[name].letter == "L"]
    cases = {length: {name: _forward_backward(name, length) for name in names} for length in lengths}
    rows = time_in_turns(cases, sizes.mixer_repetitions)
    claims = [growth(rows, name, lengths) for name in names]
    header = ("mixer", *(f"us/token, T={length}" for length in lengths), "growth")
    lines = tuple(
        (name, *(f"{rows[name, length].median / length * 1e6:.2f}" for length in lengths), f"{claim.measured:.2f}")
        for name, claim in zip(names, claims, strict=True)
    )
    return Result(
        title=f"mixers, forward + backward, fp32, B=1, dim {CONTEXT.dim}, {CONTEXT.heads} heads, {THREADS} threads",
        unit="seconds",
        body=[Table(header=header, rows=lines, numbers=frozenset(header[1:]))],
        rows=list(rows.values()),
        claims=claims,
    )


def _forward_backward(name: str, length: int) -> Timed:
    mixer = mixer_spec(name).build(CONTEXT)
    assert isinstance(mixer, nn.Module)
    x_BTD = torch.randn(1, length, CONTEXT.dim, requires_grad=True)
    leaves = [x_BTD, *mixer.parameters()]
    return lambda: torch.autograd.grad(mixer(x_BTD)[0].sum(), leaves)
