"""The block of mixers side by side, which read the same normalised input and whose outputs are summed or averaged.

    sum     y_t = sum over m of mixer_m(x_t)                    Falcon-H1 (arXiv 2507.22448)
    mean    y_t = mean over m of RMSNorm_m(mixer_m(x_t))        the fusion of Hymba (arXiv 2411.13676)

Hymba averages before one output projection, and here every mixer has its own. A norm of its own for each mixer's input
would add nothing: it would differ from the shared one by a factor per channel, which the mixer's first matrix absorbs.
Every mixer sends what other ranks need before any of them waits: they `start` in turn, and then compute their outputs.
Backward mirrors it. A mixer that cannot be started apart does all its work when it is its turn to start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hybrid_sp.shard import Shard
from layers.cache import LayerCache
from layers.cost import Cost, count_parameters
from layers.registry import BlockContext, Mixer, MixerSpec

JOINS = ("sum", "mean")


@dataclass(frozen=True, kw_only=True)
class SideBySideSpec(MixerSpec):
    """Hold the specs of the mixers by name, and how their outputs join."""

    letter: ClassVar[str] = ""  # a pattern names the mixers, and not this

    specs: tuple[tuple[str, MixerSpec], ...]
    join: str

    @property
    def norms(self) -> int:
        """The number of norms of outputs."""
        return len(self.specs) if self.join == "mean" else 0

    def build(self, context: BlockContext) -> SideBySide:
        return SideBySide({name: spec.build(context) for name, spec in self.specs}, self.join, context)


def start_mixer(mixer: Mixer, x_BTD: Tensor, shard: Shard | None) -> Callable[[], Tensor]:
    """Let a mixer compute and send what other ranks need, and return a function that computes its output."""
    if (start := getattr(mixer, "start", None)) is not None:
        finish: Callable[[], Tensor] = start(x_BTD, shard)
        return finish
    y_BTD, _ = mixer(x_BTD, shard)
    return lambda: y_BTD


class SideBySide(nn.Module):
    """Run mixers on the same input, and join their outputs. `output` of each writes to the residual stream."""

    def __init__(self, mixers: Mapping[str, Mixer], join: str, context: BlockContext) -> None:
        super().__init__()
        if join not in JOINS:
            raise ValueError(f"side_by_side is {join!r}; it must be one of {', '.join(JOINS)}")
        self.mixers: Mapping[str, Mixer] = nn.ModuleDict(mixers)  # type: ignore[assignment, arg-type]
        if join == "mean":
            self.norms = nn.ModuleDict({name: nn.RMSNorm(context.dim, eps=context.norm_eps) for name in mixers})
        self.join = join

    def init_cache(self, batch: int) -> LayerCache:
        """Make a cache of the tensors of all mixers, one mixer after the other."""
        tensors = (tensor for mixer in self.mixers.values() for tensor in mixer.init_cache(batch).tensors)
        return LayerCache(position=0, tensors=tuple(tensors))

    def forward(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        if cache is None:
            finishes = [start_mixer(mixer, x_BTD, shard) for mixer in self.mixers.values()]
            return self._join([finish() for finish in finishes]), None
        outputs: list[Tensor] = []
        kept: list[Tensor] = []
        first = 0
        for mixer in self.mixers.values():
            last = first + len(mixer.init_cache(0).tensors)
            part = LayerCache(position=cache.position, tensors=cache.tensors[first:last])
            y_BTD, extended = mixer(x_BTD, shard, part)
            assert extended is not None
            outputs.append(y_BTD)
            kept += extended.tensors
            first = last
        return self._join(outputs), cache.extended(x_BTD.shape[1], *kept)

    def _join(self, outputs: Sequence[Tensor]) -> Tensor:
        if self.join == "mean":
            normed = zip(self.norms.values(), outputs, strict=True)
            outputs = [norm(y_BTD) / len(outputs) for norm, y_BTD in normed]
        return sum(outputs[1:], start=outputs[0])

    def cost(self) -> Cost:
        """Add the costs of the mixers and the norms."""
        norms = count_parameters(self.norms) if self.join == "mean" else Cost()
        return sum((mixer.cost() for mixer in self.mixers.values()), start=norms)
