"""The config of a model, the mixer of each block that it implies, and the cost of the model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import layers.mixers  # noqa: F401 (registers them)
from hybrid_sp.backends import BACKENDS
from layers.block import FeedForward
from layers.cost import Cost
from layers.mlp import MLPS
from layers.moe import MoEConfig
from layers.pattern import Layer, expand
from layers.pattern import pattern_letters as pattern_letters
from layers.registry import MIXERS, BlockContext, MixerSpec, mixer_cost, mixer_spec, unknown
from layers.rotary import RopeScaling
from layers.side_by_side import SideBySideSpec


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Describe a HybridLM. `ratio` or `pattern` decides which blocks are linear (L) and which softmax (N)."""

    vocab: int = 256
    dim: int = 128
    depth: int = 8
    heads: int = 4
    kv_heads: int | None = None  # of softmax attention and sliding windows; None: as many as heads
    linear: str = "lightning"  # the mixer of the L blocks
    ratio: str = "1/4"  # share of softmax blocks: 1/4 is LLLN, 0 and 1 are the pure models
    pattern: Any = None  # instead of ratio: letters such as LLLN, or names such as 3*gla softmax; repeated to the depth
    side_by_side: Literal["sum", "mean"] = "sum"  # how the outputs of mixers in one block join: as they are, or normed
    mlp_dim: int | None = None  # None: 8/3 dim, rounded up to a multiple of 32
    mlp: Literal["swiglu", "relu2"] = "swiglu"  # the activation of the MLP
    moe: MoEConfig | None = None  # experts instead of the MLP, in blocks whose word in the pattern names neither
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None  # of softmax attention, to read longer sequences than in earlier training
    mixers: dict[str, dict[str, Any]] = field(  # options of mixers by name: {gla: {expand_k: 1.0}}
        default_factory=dict, metadata={"kind": lambda name: MIXERS.get(name, Any)}
    )
    backend: str = "auto"  # torch, triton, fla or flash_attn for operators that have it; auto chooses by the device


def model_layers(config: ModelConfig) -> tuple[Layer, ...]:
    """Return the names of the parts of each block.

    A wrong `linear`, `ratio` or `pattern`, or one that does not tile the depth, raises ValueError.
    """
    return expand(config.pattern, config.ratio, config.linear, config.depth)


def expand_pattern(config: ModelConfig) -> tuple[str, ...]:
    """Return the word of each block, which for a block of one mixer is its name; errors as in `model_layers`."""
    return tuple(layer.name for layer in model_layers(config))


class BlockSpec(NamedTuple):
    """Hold what a block is built from."""

    mixer: MixerSpec | None
    context: BlockContext
    feed_forward: FeedForward | None


def block_specs(config: ModelConfig) -> list[BlockSpec]:
    """Return what each block is built from. A config that fits no model raises ValueError."""
    for name in ("vocab", "dim", "heads", "kv_heads", "mlp_dim"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for name in ("norm_eps", "rope_base"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be greater than 0")
    if config.rope_scaling is not None:
        config.rope_scaling.check()
    backends = {"auto", *itertools.chain(*BACKENDS.values())}
    if config.backend not in backends:
        raise unknown("backend", config.backend, backends)
    kv_heads = config.heads if config.kv_heads is None else config.kv_heads
    if config.heads % kv_heads:
        raise ValueError(f"heads {config.heads} is not a multiple of kv_heads {kv_heads}; change one of them")
    for name, options in config.mixers.items():
        mixer_spec(name, **options)
    first = BlockContext(
        dim=config.dim,
        heads=config.heads,
        kv_heads=kv_heads,
        layer=0,
        depth=config.depth,
        norm_eps=config.norm_eps,
        rope_base=config.rope_base,
        rope_scaling=config.rope_scaling,
        backend=config.backend,
    )
    return [
        BlockSpec(_mixer(config, layer), replace(first, layer=number), _feed_forward(config, layer))
        for number, layer in enumerate(model_layers(config))
    ]


def _mixer(config: ModelConfig, layer: Layer) -> MixerSpec | None:
    specs = [(name, mixer_spec(name, **config.mixers.get(name, {}) | dict(layer.options))) for name in layer.mixers]
    if len(specs) > 1:
        return SideBySideSpec(specs=tuple(specs), join=config.side_by_side)
    return specs[0][1] if specs else None


def _feed_forward(config: ModelConfig, layer: Layer) -> FeedForward | None:
    if config.mlp not in MLPS:
        raise unknown("mlp", config.mlp, MLPS)
    kind = layer.feed_forward or ("mlp" if config.moe is None else "moe")
    if kind == "none":
        return None
    if kind == "moe" and config.moe is None:
        raise ValueError(f"pattern has {layer.name}, and the model has no moe; set model.moe, such as {{experts: 8}}")
    return FeedForward(mlp_width(config), config.mlp, config.moe if kind == "moe" else None)


def mixer_specs(config: ModelConfig) -> Iterator[tuple[str, MixerSpec, BlockContext]]:
    """Yield the name, the spec and the context of every mixer, block by block; a block may have none or several."""
    for layer, (spec, context, _) in zip(model_layers(config), block_specs(config), strict=True):
        if spec is not None:
            specs = spec.specs if isinstance(spec, SideBySideSpec) else [(layer.mixers[0], spec)]
            yield from ((name, one, context) for name, one in specs)


def mlp_width(config: ModelConfig) -> int:
    """Return the inner width of SwiGLU: at 8/3 dim its three matrices have the parameters of two of width 4 dim."""
    return config.mlp_dim or 32 * -(-8 * config.dim // (3 * 32))


def model_facts(config: ModelConfig) -> Cost:
    """Count the cost of HybridLM(config) without its memory. A config that HybridLM refuses raises ValueError."""
    return sum((cost for _, cost in _parts(config)), start=Cost())


def parameters_by_kind(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of the embedding, each kind of mixer, the feed-forward parts, the norms and the head.

    A tied head has none of its own.
    """
    counts: Counter[str] = Counter()
    for kind, cost in _parts(config):
        counts[kind] += cost.parameters
    if config.tie_embeddings:
        counts["embedding"], counts["head"] = counts["head"], 0
    return {kind: count for kind, count in counts.items() if count}


def _parts(config: ModelConfig) -> Iterator[tuple[str, Cost]]:
    """Yield the cost of every part of the model by its kind. A tied embedding counts as the head, which multiplies."""
    head, norms = config.vocab * config.dim, 1
    costs: dict[FeedForward, Cost] = {}
    yield "embedding", Cost(other_params=0 if config.tie_embeddings else head)
    for name, mixer, context in mixer_specs(config):
        yield name, mixer_cost(mixer, context)
    for spec in block_specs(config):
        if spec.mixer is not None:
            norms += 1 + (spec.mixer.norms if isinstance(spec.mixer, SideBySideSpec) else 0)
        if spec.feed_forward is not None:
            kind = "mlp" if spec.feed_forward.moe is None else "experts"
            costs[spec.feed_forward] = costs.get(spec.feed_forward) or spec.feed_forward.cost(spec.context)
            yield kind, costs[spec.feed_forward]
            norms += 1
    yield "norms", Cost(other_params=norms * config.dim)
    yield "head", Cost(matmul_params=head)
