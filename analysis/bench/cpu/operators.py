"""The operators on one device with two threads, compared with functions of other packages on the same tensors."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from analysis.bench.result import Claim, Result, Row, growth
from analysis.bench.sizes import Sizes
from analysis.bench.stopwatch import THREADS, Timed, forward_backward, time_in_turns
from analysis.tables import Table

HEADS, KEY, VALUE = 4, 64, 64
SCALAR, VECTOR = "linear_attention [B,T,H]", "linear_attention [B,T,H,K]"
NAIVE, SDPA = "fla-core naive_chunk_simple_gla", "torch causal SDPA"
DELTA, CHUNKED = "delta_rule [B,T,H]", "transformers torch_chunk_gated_delta_rule"
PEERS = {  # functions of other packages, by contender
    NAIVE: ("fla.ops.simple_gla.naive", "naive_chunk_simple_gla"),
    CHUNKED: ("transformers.models.qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule"),
}
TIMES_FASTER = {  # the bound on our speed-up, by length; 0 is any other length
    NAIVE: {4096: 3.5, 16384: 10.0, 0: 1.0},
    SDPA: {0: 1.0},
    CHUNKED: {4096: 5.0, 16384: 12.0, 0: 0.5},
}
VECTOR_OVER_SCALAR = {4096: 5.0, 16384: 4.0, 0: 5.0}  # at most


def linear(sizes: Sizes, out: Path) -> Result:
    """Compare linear_attention with fla-core's naive chunk form of simple GLA and torch's causal SDPA."""
    return _compare("linear_attention", SCALAR, _linear_contenders, sizes)


def delta(sizes: Sizes, out: Path) -> Result:
    """Compare delta_rule with the torch form of the gated delta rule in transformers' Qwen3-Next."""
    return _compare("delta_rule", DELTA, _delta_contenders, sizes)


def _compare(operator: str, ours: str, make: Callable[[int, bool], dict[str, Timed]], sizes: Sizes) -> Result:
    """Time the contenders that `make` returns for every length; peers take part at the lengths `sizes.compared`."""
    rows = time_in_turns(
        {length: make(length, length in sizes.compared) for length in sizes.lengths}, sizes.repetitions
    )
    claims = []
    for (name, length), row in rows.items():
        ratio = row.median / rows[ours, length].median
        if bounds := TIMES_FASTER.get(name):
            bound = bounds.get(length, bounds[0])
            claims.append(Claim(what=f"times faster than {name}, T={length}", measured=ratio, at_least=bound))
        elif name == VECTOR and length in sizes.compared:
            bound = VECTOR_OVER_SCALAR.get(length, VECTOR_OVER_SCALAR[0])
            claims.append(Claim(what=f"vector over scalar decay, T={length}", measured=ratio, at_most=bound))
    return Result(
        title=f"{operator}, forward + backward, fp32, B=1, H={HEADS}, K=V={KEY}, {THREADS} threads",
        unit="seconds",
        body=[_table(rows, ours)],
        rows=list(rows.values()),
        claims=[*claims, growth(rows, ours, sizes.lengths)],
    )


def _table(rows: Mapping[tuple[str, int], Row], ours: str) -> Table:
    header = ("contender", "T", "median ms", "fastest to slowest", "us/token", "times ours")
    lines = tuple(
        (
            row.contender,
            str(row.length),
            f"{row.median * 1e3:.1f}",
            f"{min(row.values) * 1e3:.1f} to {max(row.values) * 1e3:.1f}",
            f"{row.median / row.length * 1e6:.2f}",
            f"{row.median / rows[ours, row.length].median:.2f}",
        )
        for row in rows.values()
    )
    return Table(header=header, rows=lines, numbers=frozenset(header[1:]))


@functools.cache
def _import_peer(contender: str) -> Callable[..., Any] | None:
    """Import the function of another package, without its decorators.

    Return None, after a note on stderr, if the package is not installed or one that it imports is not.
    """
    module, name = PEERS[contender]
    try:
        return inspect.unwrap(getattr(importlib.import_module(module), name))
    except ImportError as error:
        print(f"skipped: {contender} ({error})", file=sys.stderr)
        return None


def _linear_contenders(length: int, compared: bool) -> dict[str, Timed]:
    torch.manual_seed(0)
    q, k, v, d_o = (torch.randn(1, length, HEADS, width) for width in (KEY, KEY, VALUE, VALUE))
    gate = F.logsigmoid(torch.randn(1, length, HEADS, KEY)) / 16  # as GLA starts: decays of 0.9 and more
    decays = {SCALAR: gate[..., 0], VECTOR: gate, "linear_attention [H]": gate[0, 0, :, 0]}

    def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
        o = hsp.linear_attention(q, k, v, log_decay=g)
        assert isinstance(o, Tensor)
        return o

    timed = {name: forward_backward(ours, (q, k, v, g), d_o) for name, g in decays.items()}
    timed["linear_attention, no decay"] = forward_backward(ours, (q, k, v), d_o)
    if compared:
        if naive := _import_peer(NAIVE):
            timed[NAIVE] = forward_backward(lambda *inputs: naive(*inputs)[0], (q, k, v, gate[..., 0]), d_o)
        by_head = [x.transpose(1, 2).contiguous() for x in (q, k, v, d_o)]
        sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True)
        timed[SDPA] = forward_backward(sdpa, by_head[:3], by_head[3])
    return timed


def _delta_contenders(length: int, compared: bool) -> dict[str, Timed]:
    torch.manual_seed(0)
    q, k, v, d_o = (torch.randn(1, length, HEADS, width) for width in (KEY, KEY, VALUE, VALUE))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta = torch.rand(1, length, HEADS)
    gate = F.logsigmoid(torch.randn(1, length, HEADS, KEY)) / 16

    def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
        o = hsp.delta_rule(q, k, v, beta=beta, log_decay=g)
        assert isinstance(o, Tensor)
        return o

    timed = {
        DELTA: forward_backward(ours, (q, k, v, beta, gate[..., 0]), d_o),
        "delta_rule [B,T,H,K]": forward_backward(ours, (q, k, v, beta, gate), d_o),
        "delta_rule, no decay": forward_backward(ours, (q, k, v, beta), d_o),
    }
    if compared and (chunked := _import_peer(CHUNKED)):  # the form in torch, never a kernel

        def theirs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
            return chunked(q, k, v, g=g, beta=beta)[0]

        timed[CHUNKED] = forward_backward(theirs, (q, k, v, beta, gate[..., 0]), d_o)
    return timed
