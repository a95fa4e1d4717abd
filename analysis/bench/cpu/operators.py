"""Operators forward and backward on one device with two threads, beside what else computes the same on a CPU."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from analysis.bench.measure import (
    HEADER,
    THREADS,
    Claim,
    Result,
    Row,
    Sizes,
    Timed,
    forward_backward,
    growth,
    lines_of,
    timed_in_turns,
)

HEADS, KEY, VALUE = 4, 64, 64
SETTING = f"forward + backward, fp32, B=1, H={HEADS}, K=V={KEY}, {THREADS} threads"

SCALAR, VECTOR = "linear_attention [B,T,H]", "linear_attention [B,T,H,K]"
NAIVE, SDPA = "fla-core naive_chunk_simple_gla", "torch causal SDPA"


def linear(sizes: Sizes, out: Path) -> Result:
    """hsp.linear_attention, beside fla-core's naive chunk form of simple GLA and torch's causal SDPA."""
    cases = {length: _linear_contenders(length, length in sizes.compared) for length in sizes.lengths}
    rows = timed_in_turns(cases, sizes.repetitions)
    claims = []
    for length in sizes.compared:
        ours = rows[SCALAR, length].median
        bounds = {NAIVE: {4096: 3.5, 16384: 10.0}.get(length, 1.0), SDPA: 1.0}
        for name, bound in bounds.items():
            if (name, length) not in rows:  # it has been said
                continue
            ratio = rows[name, length].median / ours
            claims.append(Claim(what=f"times faster than {name}, T={length}", measured=ratio, at_least=bound))
        ratio = rows[VECTOR, length].median / ours
        bound = {4096: 5.0, 16384: 4.0}.get(length, 5.0)
        claims.append(Claim(what=f"vector over scalar decay, T={length}", measured=ratio, at_most=bound))
    claims.append(growth(rows, SCALAR, sizes.lengths))
    return _result("linear_attention", SCALAR, rows, claims)


def _linear_contenders(length: int, compared: bool) -> dict[str, Timed]:
    """Forward-and-backward calls at one length, over the same random tensors."""
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
        if naive := _naive_chunk_simple_gla():
            timed[NAIVE] = forward_backward(lambda *inputs: naive(*inputs)[0], (q, k, v, gate[..., 0]), d_o)
        by_head = [x.transpose(1, 2).contiguous() for x in (q, k, v, d_o)]
        timed[SDPA] = forward_backward(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), by_head[:3], by_head[3]
        )
    return timed


@functools.cache
def _naive_chunk_simple_gla() -> Callable[..., Any] | None:
    """fla-core's; None, which is said, where it or the triton that it imports is not installed."""
    try:
        from fla.ops.simple_gla.naive import naive_chunk_simple_gla
    except ImportError as error:
        print(f"skipped: {NAIVE} ({error})", file=sys.stderr)
        return None
    return naive_chunk_simple_gla


def _result(operator: str, ours: str, rows: dict[tuple[str, int], Row], claims: list[Claim]) -> Result:
    lines = lines_of(rows, ours)
    title = f"{operator}, {SETTING}"
    return Result(title=title, unit="seconds", header=HEADER, lines=lines, rows=list(rows.values()), claims=claims)


DELTA, CHUNKED = "delta_rule [B,T,H]", "transformers torch_chunk_gated_delta_rule"


def delta(sizes: Sizes, out: Path) -> Result:
    """hsp.delta_rule, beside the chunk form in torch of the gated delta rule in transformers' Qwen3-Next."""
    cases = {length: _delta_contenders(length, length in sizes.compared) for length in sizes.lengths}
    rows = timed_in_turns(cases, sizes.repetitions)
    claims = []
    for length in sizes.compared:
        ratio = rows[CHUNKED, length].median / rows[DELTA, length].median
        bound = {4096: 2.3, 16384: 5.0}.get(length, 0.5)
        claims.append(Claim(what=f"times faster than {CHUNKED}, T={length}", measured=ratio, at_least=bound))
    claims.append(growth(rows, DELTA, sizes.lengths))
    return _result("delta_rule", DELTA, rows, claims)


def _delta_contenders(length: int, compared: bool) -> dict[str, Timed]:
    """Forward-and-backward calls at one length, over the same random tensors."""
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
    if compared:
        from transformers.models.qwen3_next import modeling_qwen3_next

        chunked = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)  # the one in torch, never a kernel

        def theirs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
            return chunked(q, k, v, g=g, beta=beta)[0]

        timed[CHUNKED] = forward_backward(theirs, (q, k, v, beta, gate[..., 0]), d_o)
    return timed
