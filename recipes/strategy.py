"""Resolve how the layers of a run communicate, `parallel.linear: auto` included, and describe it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import hybrid_sp as hsp
from hybrid_sp.comm import collectives
from hybrid_sp.comm.groups import Group
from hybrid_sp.comm.link import Link
from hybrid_sp.exchange import choose
from hybrid_sp.exchange.auto import Choice, measure_link
from layers.config import mixer_specs
from layers.registry import mixer_cost
from recipes.config import Recipe


def with_link(sp: hsp.SequenceParallel, group: Group) -> hsp.SequenceParallel:
    """Measure the link if linear="auto" needs one, and return the settings with it.

    All ranks of `group` (dp x sp) call it together. They agree on the slowest link, so that all replicas choose the
    same exchanges.
    """
    if sp.linear != "auto" or sp.link is not None or sp.size == 1:
        return sp
    links = collectives.gather_objects(measure_link(sp.group), group)
    return replace(
        sp, link=Link(latency=max(link.latency for link in links), bandwidth=min(link.bandwidth for link in links))
    )


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Hold the exchanges of a run; `linear` has one for each kind of linear block."""

    linear: dict[str, Choice]
    softmax: str
    link: Link | None

    def facts(self) -> dict[str, Any]:
        """Return the exchanges for the provenance of a run."""
        linear = {
            name: {"exchange": choice.strategy, "seconds": choice.seconds} for name, choice in self.linear.items()
        }
        return {"linear": linear, "softmax": self.softmax, "link": self.link and asdict(self.link)}

    def __str__(self) -> str:
        kinds = [f"{name} {choice.strategy}{_times(choice)}" for name, choice in self.linear.items()]
        text = ", ".join([*kinds, f"softmax {self.softmax}"])
        if self.link is None:
            return text
        return f"{text}; link {1e6 * self.link.latency:.0f} us, {self.link.bandwidth / 1e9:.3g} GB/s"


def strategy(recipe: Recipe, sp: hsp.SequenceParallel) -> Strategy:
    """Choose the exchanges of a recipe's blocks; with linear="auto", `sp` must have its link."""
    batch = 1 if recipe.data.pack else recipe.train.batch // (recipe.parallel.dp * recipe.train.accumulation)
    number_bytes = 8 if recipe.train.dtype == "float64" else 4
    linear: dict[str, Choice] = {}
    for name, spec, context in mixer_specs(recipe.model):
        for summary in mixer_cost(spec, context).summaries:
            state, transition = (batch * summary.heads * number_bytes * n for n in summary.numbers)
            linear[name] = choose(sp, state_bytes=state, transition_bytes=transition)
    return Strategy(linear=linear, softmax=sp.softmax, link=sp.link if sp.linear == "auto" else None)


def _times(choice: Choice) -> str:
    """Format the predicted times among which `auto` chose; empty without a choice."""
    times = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in (choice.seconds or {}).items())
    return f" (of {times} ms)" * bool(times)
