"""The registry of mixers by name, and the interfaces of a mixer and its spec."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from hybrid_sp.backends import BACKENDS
from hybrid_sp.shard import Shard
from layers.cache import LayerCache
from layers.cost import Cost
from layers.rotary import RopeScaling


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """Describe the block and the model around a mixer, in addition to the mixer's own options."""

    dim: int
    heads: int
    kv_heads: int
    layer: int  # number of the block, from 0
    depth: int  # number of blocks
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None = None
    backend: str = "auto"
    head_dim: int | None = None  # None: dim / heads

    def resized(self, heads: int, head_dim: int) -> BlockContext:
        """Return this context with a mixer's own heads, and their width at `expand` 1.

        0 heads are the model's. A head_dim of 0 is dim / heads.
        """
        return replace(self, heads=heads or self.heads, head_dim=head_dim or None)

    def width(self, expand: float = 1.0, *, option: str = "expand", even: bool = False) -> int:
        """Return `expand` times the width of a head: `expand * dim` channels, divided by the heads.

        `option` names the mixer's option in the ValueError for sizes that do not fit. `even` requires pairs to rotate.
        """
        channels = (self.dim if self.head_dim is None else self.head_dim * self.heads) * expand
        if channels < self.heads or channels % self.heads:
            given = f"dim {self.dim}" if self.head_dim is None else f"head_dim {self.head_dim}"
            raise ValueError(
                f"{given} with {option} {expand:g} is {channels:g} channels, which {self.heads} heads cannot "
                f"share evenly; change dim or heads (or {option}) so that the channels are a multiple of the heads"
            )
        width = int(channels) // self.heads
        if even and width % 2:
            raise ValueError(
                f"dim {self.dim} gives each of {self.heads} heads {width} channels, which rotary embedding cannot "
                f"pair; change dim or heads so that dim / heads is even"
            )
        return width

    def backend_of(self, operator: str) -> str:
        """Return the model's backend if this operator of the engine has it, else auto."""
        return self.backend if self.backend in BACKENDS[operator] else "auto"

    def groups(self, count: int, *, option: str) -> int:
        """Return the number of key heads, each shared by equally many value heads. 0 means as many as heads.

        `option` names the mixer's option in the ValueError for a number that does not divide the heads.
        """
        if count and self.heads % count:
            raise ValueError(f"heads {self.heads} is not a multiple of {option} {count}; change one of them")
        return count or self.heads


class Mixer(Protocol):
    """Define the interface of a mixer, an nn.Module that moves information between tokens.

    Its nn.Linear called `output` writes to the residual stream. With a cache, on one device, the tokens continue those
    in the cache, and the new cache contains them too. `cost` includes the mixer's parameters.

    A mixer may also have `start(x_BTD, shard)`, which sends what other ranks need and returns a function that computes
    the output. Side by side with others, all of them then send before any waits.
    """

    def __call__(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]: ...

    def init_cache(self, batch: int) -> LayerCache: ...

    def cost(self) -> Cost: ...


class MixerSpec(Protocol):
    """Define the interface of a spec, a frozen dataclass that holds a mixer's options and builds the mixer.

    A spec inherits it, and with it the letter of linear mixers.
    """

    letter: ClassVar[str] = "L"  # in pattern strings: L linear, N normal (softmax) attention

    def build(self, context: BlockContext) -> Mixer: ...


MIXERS: dict[str, type[MixerSpec]] = {}

SpecClass = TypeVar("SpecClass", bound=type)


def mixer_cost(spec: MixerSpec, context: BlockContext) -> Cost:
    """Count the cost of the mixer that the spec builds, without the memory of its weights."""
    hashable: Any = spec  # a frozen dataclass
    return _cost(hashable, context)


@lru_cache(maxsize=1024)
def _cost(spec: Any, context: BlockContext) -> Cost:
    with torch.device("meta"):
        return spec.build(context).cost()


def register(name: str) -> Callable[[SpecClass], SpecClass]:
    """Register the decorated spec class, which recipes then know as `name`."""

    def add(spec_class: SpecClass) -> SpecClass:
        assert name not in MIXERS, f"two mixers are called {name!r}"
        MIXERS[name] = spec_class
        return spec_class

    return add


def unknown(kind: str, name: str, known: Iterable[str], owner: str = "") -> ValueError:
    """Make the error for an unknown name, which suggests the nearest known one."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return ValueError(f"unknown {kind} {name!r}{owner}; {hint}known: {', '.join(names) or 'none'}")


def at_least(least: int, mixer: str, **options: int) -> None:
    """Raise ValueError for an option of the mixer below the least value."""
    for option, value in options.items():
        if value < least:
            raise ValueError(f"{option} of {mixer} is {value}; it must be at least {least}")


def mixer_spec(name: str, **options: Any) -> MixerSpec:
    """Make the spec of the mixer called `name`. An unknown name or option, or a wrong type, raises ValueError."""
    if name not in MIXERS:
        raise unknown("mixer", name, MIXERS)
    known = {field.name: field for field in fields(MIXERS[name])}  # type: ignore[arg-type]
    for option, value in options.items():
        if option not in known:
            raise unknown("option", option, known, f" of mixer {name!r}")
        default = known[option].default
        assert default is not MISSING, f"option {option!r} of mixer {name!r} has no default"
        if isinstance(default, float) and type(value) is int:
            options[option] = float(value)
        elif type(value) is not type(default):
            raise ValueError(
                f"option {option!r} of mixer {name!r} is {value!r}, a {type(value).__name__}; "
                f"it must be a {type(default).__name__}, such as the default {default!r}"
            )
    spec = MIXERS[name](**options)
    at_least(0, name, **{option: value for option, value in options.items() if type(value) is int})
    return spec
