"""The block of mixers side by side, which read the same normalised input and whose outputs are summed or averaged.

    sum     y_t = sum over m of mixer_m(x_t)                    Falcon-H1 (arXiv 2507.22448)
    mean    y_t = mean over m of RMSNorm_m(mixer_m(x_t))        the fusion of Hymba (arXiv 2411.13676)

Hymba averages before one output projection, and here every mixer has its own. A norm of its own for each mixer's input
would add nothing: it would differ from the shared one by a factor per channel, which the mixer's first matrix absorbs.
Without a cache all mixers start their operators before any is finished, so that all exchanges are in flight at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hybrid_sp.shard import Shard
from layers.cache import LayerCache
from layers.cost import Cost, count_parameters
from layers.registry import BlockContext, Mixer, MixerSpec, TwoStepMixer

JOINS = ("sum", "mean")


@dataclass(frozen=True, kw_only=True)
class SideBySideSpec(MixerSpec):
    """Hold the specs of the mixers by name, and how their outputs join."""

    letter: ClassVar[str] = ""  # a pattern names the mixers, and not this

    specs: tuple[tuple[str, MixerSpec], ...]
    join: str

    def build(self, context: BlockContext) -> SideBySide:
        return SideBySide({name: spec.build(context) for name, spec in self.specs}, self.join, context)


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
        outputs: list[Tensor] = []
        kept: list[Tensor] = []
        first = 0
        two = {name: mixer for name, mixer in self.mixers.items() if cache is None and isinstance(mixer, TwoStepMixer)}
        started = {name: mixer.start(x_BTD, shard) for name, mixer in two.items()}
        for name, mixer in self.mixers.items():
            part = None
            if cache is not None:
                last = first + len(mixer.init_cache(0).tensors)
                part, first = LayerCache(position=cache.position, tensors=cache.tensors[first:last]), last
            y_BTD, part = two[name].finish(started[name]) if name in two else mixer(x_BTD, shard, part)
            outputs.append(y_BTD if self.join == "sum" else self.norms[name](y_BTD) / len(self.mixers))
            kept += [] if part is None else part.tensors
        return sum(outputs[1:], start=outputs[0]), None if cache is None else cache.extended(x_BTD.shape[1], *kept)

    def cost(self) -> Cost:
        """Add the costs of the mixers and the norms."""
        norms = count_parameters(self.norms) if self.join == "mean" else Cost()
        return sum((mixer.cost() for mixer in self.mixers.values()), start=norms)
