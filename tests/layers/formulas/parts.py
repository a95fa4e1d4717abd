"""What the formulas of several mixers share, and the context that all are built for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layers.registry import BlockContext

CONTEXT = BlockContext(dim=24, heads=4, kv_heads=2, layer=1, depth=4, norm_eps=1e-6, rope_base=100.0)

Weights = dict[str, Tensor]


def heads(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """[B,T,count,width] of x weight^T."""
    return torch.stack([x @ rows.T for rows in weight.chunk(count)], dim=2)


def rms_norm(o: Tensor, weight: Tensor) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + CONTEXT.norm_eps).sqrt() * weight


def turned(x: Tensor) -> Tensor:
    """Channels i and i + K/2 as one complex number, turned by position * base**(-2i/K)."""
    half = x.shape[-1] // 2
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        for i in range(half):
            angle = t * CONTEXT.rope_base ** (-2 * i / x.shape[-1])
            z = torch.complex(x[:, t, :, i], x[:, t, :, i + half]) * complex(math.cos(angle), math.sin(angle))
            y[:, t, :, i], y[:, t, :, i + half] = z.real, z.imag
    return y


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def length_one(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def projected(w: Weights, x: Tensor, *sizes: tuple[int, int]) -> list[Tensor]:
    """[B,T,count,width] of every (count, width); the channels of the first three convolved with SiLU, if there are taps
    for them."""
    rows = w["project.linear.weight"].split([count * width for count, width in sizes])
    outputs = [x @ r.T for r in rows]
    if "conv.weight" in w:
        taps = w["conv.weight"].split([r.shape[0] for r in rows[:3]])
        biases = w["conv.bias"].split([r.shape[0] for r in rows[:3]]) if "conv.bias" in w else [0, 0, 0]
        for i in range(3):
            outputs[i] = silu(convolved(outputs[i], taps[i]) + biases[i])
    return [y.unflatten(-1, size) for y, size in zip(outputs, sizes, strict=True)]


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Token t's channels, and those of the tokens before it, by the weight's columns from the last to the first."""
    outputs = []
    width = weight.shape[1]
    for t in range(x.shape[1]):
        reach = range(min(width, t + 1))
        outputs.append(torch.stack([x[:, t - back] * weight[:, width - 1 - back] for back in reach]).sum(0))
    return torch.stack(outputs, dim=1)
