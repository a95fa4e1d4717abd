"""The baselines: other forms of the operators, for comparison. One line each, by the kind of layer."""

from __future__ import annotations

from ..exchange.strategy import TokenStrategy
from . import head_parallel, linear_ring_attention, ring_attention

BASELINES: dict[str, dict[str, TokenStrategy]] = {
    "linear": {
        "ulysses": head_parallel.ULYSSES,
        "megatron": head_parallel.MEGATRON,
        "ring_attention": linear_ring_attention.STRATEGY,
    },
    "softmax": {
        "ring": ring_attention.STRATEGY,
        "ulysses": head_parallel.ULYSSES,
        "megatron": head_parallel.MEGATRON,
    },
}
