"""The config of a model, the mixer of each block that it implies, and the cost of the model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch

import layers.mixers  # noqa: F401 (registers them)
from hybrid_sp.backends import BACKENDS
from layers.block import Block
from layers.cost import Cost
from layers.registry import MIXERS, BlockContext, MixerSpec, mixer_spec, unknown
from layers.rotary import RopeScaling


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
    pattern: Any = None  # instead of ratio: letters such as LLLN, or a list of mixer names; repeated to the depth
    mlp_dim: int | None = None  # None: 8/3 dim, rounded up to a multiple of 32
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None  # of softmax attention, to read longer sequences than in earlier training
    mixers: dict[str, dict[str, Any]] = field(  # options of mixers by name: {gla: {expand_k: 1.0}}
        default_factory=dict, metadata={"kind": lambda name: MIXERS.get(name, Any)}
    )
    backend: str = "auto"  # torch, triton, fla or flash_attn for operators that have it; auto chooses by the device


def expand_pattern(config: ModelConfig) -> tuple[str, ...]:
    """Return the mixer of each block.

    A wrong `linear`, `ratio` or `pattern`, or one that does not tile the depth, raises ValueError.
    """
    linear_names = [name for name, spec in MIXERS.items() if spec.letter == "L"]
    if config.linear not in linear_names:
        raise unknown("linear mixer", config.linear, linear_names)
    if config.depth < 1:
        raise ValueError(f"depth is {config.depth}; it must be at least 1")
    tile = _ratio_tile(config) if config.pattern is None else _pattern_tile(config)
    return tile * (config.depth // len(tile))


def _refuse_rest(config: ModelConfig, source: str, blocks: int, advice: str) -> None:
    """Raise ValueError unless a tile of this many blocks fits the depth."""
    repeats, rest = divmod(config.depth, blocks)
    if rest:
        depths = " or ".join(_short(n * blocks) for n in (repeats, repeats + 1) if n)
        raise ValueError(
            f"{source} is a tile of {_short(blocks)} blocks, which does not tile a depth of {config.depth}; "
            f"{advice}, or set depth to {depths}"
        )


def _ratio_tile(config: ModelConfig) -> tuple[str, ...]:
    """Spread the a softmax blocks of a ratio a/b evenly over b blocks, ending with one: 2/5 is LLNLN."""
    text, depth = str(config.ratio), config.depth
    try:
        ratio = Fraction(text)
    except (ValueError, ZeroDivisionError):
        hint = " such as 1/4, 0 or 1"
        if parts := re.fullmatch(r"([1-9]\d?):([1-9]\d?)", text):
            linear, softmax = map(int, parts.groups())
            share = Fraction(softmax, linear + softmax)
            hint = f"; {linear} linear blocks for {softmax} of softmax attention are a ratio of {share}"
        raise ValueError(f"ratio {_short(text)!r} is not a fraction{hint}") from None
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio {_short(text)} is not a share of blocks; it must be between 0 and 1, such as 1/4")
    shares = [Fraction(softmax, depth) for softmax in range(1, depth)] or [Fraction(0), Fraction(1)]
    nearest = min(shares, key=lambda share: abs(share - ratio))
    _refuse_rest(config, f"ratio {_short(text)}", ratio.denominator, f"the nearest ratio that does is {nearest}")
    due = [block * ratio.numerator // ratio.denominator for block in range(ratio.denominator + 1)]
    return tuple("softmax" if after > before else config.linear for before, after in zip(due, due[1:], strict=False))


def _pattern_tile(config: ModelConfig) -> tuple[str, ...]:
    pattern = config.pattern
    if not pattern:
        raise ValueError("pattern is empty; give letters such as LLLN or a list of mixer names, or leave it out")
    if not isinstance(pattern, (str, Sequence)):
        raise ValueError(f"pattern {_short(pattern)} is neither letters such as LLLN nor a list of mixer names")
    if isinstance(pattern, str):
        if set(pattern) - set("LN"):
            raise ValueError(
                f"pattern {_short(pattern)!r} has letters other than L (linear) and N (softmax); mixers are named in a "
                f"list, such as [{pattern if pattern in MIXERS else 'gla'}, softmax]"
            )
        pattern = [{"L": config.linear, "N": "softmax"}[letter] for letter in pattern]
    for name in pattern:
        if not isinstance(name, str) or name not in MIXERS:
            raise unknown("mixer in pattern", str(name), MIXERS)
    _refuse_rest(config, f"pattern {_short(pattern_letters(pattern))}", len(pattern), "change it")
    return tuple(pattern)


def _short(value: object) -> str:
    """Shorten a value for a message to its first 40 characters."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def pattern_letters(names: Iterable[str]) -> str:
    """Write one letter per block, L for a linear mixer and N for softmax attention: LLLNLLLN."""
    return "".join(MIXERS[name].letter for name in names)


def block_specs(config: ModelConfig) -> list[tuple[MixerSpec, BlockContext]]:
    """Return the spec and the context of each block. A config that fits no model raises ValueError."""
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
    specs = {name: mixer_spec(name, **options) for name, options in config.mixers.items()}
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
        (specs.get(name) or mixer_spec(name), replace(first, layer=layer))
        for layer, name in enumerate(expand_pattern(config))
    ]


def mlp_width(config: ModelConfig) -> int:
    """Return the inner width of SwiGLU: at 8/3 dim its three matrices have the parameters of two of width 4 dim."""
    return config.mlp_dim or 32 * -(-8 * config.dim // (3 * 32))


def model_facts(config: ModelConfig) -> Cost:
    """Count the cost of HybridLM(config) without its memory. A config that HybridLM refuses raises ValueError."""
    with torch.device("meta"):  # takes no memory and draws no random number
        blocks = [Block(spec, context, mlp_width(config)).cost() for spec, context in block_specs(config)]
    head = config.vocab * config.dim
    embedding = 0 if config.tie_embeddings else head
    return sum(blocks, start=Cost(matmul_params=head, other_params=embedding + config.dim))
