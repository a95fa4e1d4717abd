"""The mixture of experts against an MLP of the same FLOPs per token, forward and backward on one device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from analysis.bench.result import Claim, Result
from analysis.bench.sizes import Sizes
from analysis.bench.stopwatch import THREADS, Timed, time_in_turns
from analysis.tables import Table
from layers.mlp import SwiGLU
from layers.moe import MoE, MoEConfig

DIM, EXPERTS, ACTIVE = 256, 8, 2
WIDTHS = (352, 704)  # of one expert
DENSE, SPARSE = "MLP of width", "8 experts, 2 active, each of width"


def experts(sizes: Sizes, out: Path) -> Result:
    """Time a mixture of experts and an MLP as wide as the experts of a token together."""
    tokens = sizes.expert_tokens
    torch.manual_seed(0)
    contenders: dict[str, Timed] = {}
    for width in WIDTHS:
        moe = MoE(MoEConfig(experts=EXPERTS, active=ACTIVE, dim=width), DIM, width, 1)
        with torch.no_grad():
            for weight in moe.parameters():
                weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
        contenders[f"{DENSE} {ACTIVE * width}"] = _forward_backward(SwiGLU(DIM, ACTIVE * width), tokens)
        contenders[f"{SPARSE} {width}"] = _forward_backward(moe, tokens)
    rows = time_in_turns({tokens: contenders}, sizes.expert_repetitions)
    claims = [
        Claim(
            what=f"{SPARSE} {width}, time over an MLP of width {ACTIVE * width}, {tokens} tokens",
            measured=rows[f"{SPARSE} {width}", tokens].median / rows[f"{DENSE} {ACTIVE * width}", tokens].median,
            at_most=1.5,
        )
        for width in WIDTHS
    ]
    header = ("feed-forward part", "median ms", "fastest to slowest")
    lines = tuple(
        (name, f"{row.median * 1e3:.1f}", f"{min(row.values) * 1e3:.1f} to {max(row.values) * 1e3:.1f}")
        for (name, _), row in rows.items()
    )
    return Result(
        title=f"experts, forward + backward, fp32, {tokens} tokens, dim {DIM}, {THREADS} threads",
        unit="seconds",
        body=[Table(header=header, rows=lines, numbers=frozenset(header[1:]))],
        rows=list(rows.values()),
        claims=claims,
    )


def _forward_backward(part: nn.Module, tokens: int) -> Timed:
    x_BTD = torch.randn(1, tokens, DIM, requires_grad=True)
    leaves = [x_BTD, *part.parameters()]

    def run() -> tuple[Tensor, ...]:
        y = part(x_BTD)
        return torch.autograd.grad((y[0] if isinstance(y, tuple) else y).sum(), leaves)

    return run
