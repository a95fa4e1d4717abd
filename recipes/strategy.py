"""How a run's layers communicate: what `parallel.linear: auto` comes to on this network, and what a run says of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import hybrid_sp as hsp
from hybrid_sp.comm import collectives
from hybrid_sp.comm.groups import Group
from hybrid_sp.comm.link import Link
from hybrid_sp.exchange import choose
from hybrid_sp.exchange.auto import Choice, measured
from layers.config import block_specs, expand_pattern
from layers.registry import mixer_cost
from recipes.config import Recipe


def with_link(sp: hsp.SequenceParallel, group: Group) -> hsp.SequenceParallel:
    """The same with its link, if linear="auto" asks for one that must be measured. All ranks of `group` (dp x sp) call
    it together, and agree on the slowest link of all, so that replicas choose the same exchanges."""
    if sp.linear != "auto" or sp.link is not None or sp.size == 1:
        return sp
    links = collectives.gather_objects(measured(sp.group), group)
    return replace(
        sp, link=Link(latency=max(one.latency for one in links), bandwidth=min(one.bandwidth for one in links))
    )


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """`linear` holds the exchange of each kind of linear block."""

    linear: dict[str, Choice]
    softmax: str
    link: Link | None

    def facts(self) -> dict[str, Any]:
        """For the provenance of a run."""
        linear = {name: {"exchange": one.strategy, "seconds": one.seconds} for name, one in self.linear.items()}
        link = self.link and {"latency": self.link.latency, "bandwidth": self.link.bandwidth}
        return {"linear": linear, "softmax": self.softmax, "link": link}

    def __str__(self) -> str:
        kinds = [f"{name} {one.strategy}{_times(one)}" for name, one in self.linear.items()]
        text = ", ".join([*kinds, f"softmax {self.softmax}"])
        if self.link is not None:
            text += f"; link {1e6 * self.link.latency:.0f} us, {self.link.bandwidth / 1e9:.3g} GB/s"
        return text


def strategy(recipe: Recipe, sp: hsp.SequenceParallel) -> Strategy:
    """What the blocks of a recipe's model use; with linear="auto" `sp` has its link."""
    batch = 1 if recipe.data.pack else recipe.train.batch // (recipe.parallel.dp * recipe.train.accumulation)
    number_bytes = 8 if recipe.train.dtype == "float64" else 4
    linear: dict[str, Choice] = {}
    for name, (spec, context) in zip(expand_pattern(recipe.model), block_specs(recipe.model), strict=True):
        for summary in mixer_cost(spec, context).summaries:
            state, transition = (batch * summary.heads * number_bytes * n for n in summary.numbers)
            linear[name] = choose(sp, state_bytes=state, transition_bytes=transition)
    return Strategy(linear=linear, softmax=sp.softmax, link=sp.link if sp.linear == "auto" else None)


def _times(choice: Choice) -> str:
    if choice.seconds is None:
        return ""
    return f" (of {', '.join(f'{name} {1e3 * seconds:.2f}' for name, seconds in choice.seconds.items())} ms)"
