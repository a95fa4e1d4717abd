"""Every mixer, in the variants that the tests of this room go through, with its formula written from its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layers.registry import Place, mixer_spec
from tests.support.oracle import linear_attention_loop, softmax_attention_loop

PLACE = Place(dim=24, heads=4, kv_heads=2, layer=1, depth=4, norm_eps=1e-6, rope_base=100.0)

Weights = dict[str, Tensor]


def heads(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """[B,T,count,width] of x weight^T."""
    return torch.stack([x @ rows.T for rows in weight.chunk(count)], dim=2)


def rms_norm(o: Tensor, weight: Tensor) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + PLACE.norm_eps).sqrt() * weight


def turned(x: Tensor) -> Tensor:
    """Channels i and i + K/2 as one complex number, turned by position * base**(-2i/K)."""
    half = x.shape[-1] // 2
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        for i in range(half):
            angle = t * PLACE.rope_base ** (-2 * i / x.shape[-1])
            z = torch.complex(x[:, t, :, i], x[:, t, :, i + half]) * complex(math.cos(angle), math.sin(angle))
            y[:, t, :, i], y[:, t, :, i + half] = z.real, z.imag
    return y


def linear(w: Weights, x: Tensor, feature_map: str = "identity", normalize: bool = False) -> Tensor:
    feature = {
        "identity": lambda z: z,
        "elu+1": lambda z: torch.where(z > 0, z + 1, z.exp()),
        "relu": lambda z: z.clamp(min=0),
        "softmax": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),
    }[feature_map]
    q, k, v = (heads(x, rows, 4) for rows in w["project.linear.weight"].split([24, 24, 24]))
    o, _ = linear_attention_loop(feature(q), feature(k), v, normalize=normalize)
    if not normalize:
        o = rms_norm(o, w["norm.weight"])
    return o.flatten(2) @ w["output.weight"].T


def lightning(w: Weights, x: Tensor) -> Tensor:
    q, k, v, g = (heads(x, rows, 4) for rows in w["project.linear.weight"].split([24, 24, 24, 24]))
    log_decay = torch.tensor([-(8 * h / 4) * (1 - 1 / 4) for h in range(4)], dtype=x.dtype)
    o, _ = linear_attention_loop(q * torch.sigmoid(q), k * torch.sigmoid(k), v, log_decay)
    y = rms_norm(o.flatten(2), w["norm.weight"]) / (1 + torch.exp(-g.flatten(2)))
    return y @ w["output.weight"].T


def retention(w: Weights, x: Tensor) -> Tensor:
    q, k, v, g = (heads(x, rows, 4) for rows in w["project.linear.weight"].split([24, 24, 48, 48]))
    log_decay = torch.tensor([math.log(1 - 2 ** (-5 - h)) for h in range(4)], dtype=x.dtype)
    o, _ = linear_attention_loop(turned(q), turned(k), v, log_decay)
    return (rms_norm(o, w["norm.weight"]) * g * torch.sigmoid(g)).flatten(2) @ w["output.weight"].T


def gla(w: Weights, x: Tensor, expand_k: float = 0.5, temperature: float = 16.0) -> Tensor:
    keys = int(24 * expand_k)
    q, k, v, g = (heads(x, rows, 4) for rows in w["project.linear.weight"].split([keys, keys, 24, 24]))
    logits = x @ w["rule.low_rank.0.weight"].T @ w["rule.low_rank.1.weight"].T + w["rule.low_rank.1.bias"]
    decay = torch.sigmoid(logits) ** (1 / temperature)
    o, _ = linear_attention_loop(q, k, v, decay.log().unflatten(-1, (4, -1)))
    return (rms_norm(o, w["norm.weight"]) * g * torch.sigmoid(g)).flatten(2) @ w["output.weight"].T


def softmax(w: Weights, x: Tensor) -> Tensor:
    q_rows, k_rows, v_rows = w["project.linear.weight"].split([24, 12, 12])
    o = softmax_attention_loop(turned(heads(x, q_rows, 4)), turned(heads(x, k_rows, 2)), heads(x, v_rows, 2))
    return o.flatten(2) @ w["output.weight"].T


@dataclass(frozen=True, kw_only=True)
class Case:
    mixer: str
    formula: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.mixer, *(f"{value}" for value in self.options.values())])

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The mixer at PLACE, with weights that make every part of it count."""
        module = mixer_spec(self.mixer, **self.options).build(PLACE).to(dtype)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in module.named_parameters():
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(1 + 0.3 * noise if name == "norm.weight" else 0.5 * noise)
        return module


CASES = [
    Case(mixer="linear", formula=linear),
    Case(mixer="linear", formula=linear, options={"feature_map": "relu"}),
    Case(mixer="linear", formula=linear, options={"feature_map": "elu+1", "normalize": True}),
    Case(mixer="linear", formula=linear, options={"feature_map": "softmax", "normalize": True}),
    Case(mixer="lightning", formula=lightning),
    Case(mixer="retention", formula=retention),
    Case(mixer="gla", formula=gla),
    Case(mixer="gla", formula=gla, options={"expand_k": 1.0, "temperature": 2.0}),
    Case(mixer="softmax", formula=softmax),
]


def tokens(count: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    """Input of a mixer at PLACE."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, count, PLACE.dim, generator=generator, dtype=torch.float64).to(dtype)
