"""The exchanges that tell each rank the states that enter its spans: one file per strategy, one line each here."""

from __future__ import annotations

from torch import Tensor

from ..comm.link import Link
from ..overlap import Exchange
from ..shard import SequenceParallel, Shard
from . import all_gather, chain, doubling, star
from .all_gather import AllGatherSum
from .auto import Choice, measure_link
from .strategy import Request, Sizes, Strategy

__all__ = ["EXCHANGES", "AllGatherSum", "Request", "Sizes", "Strategy", "choose", "choose_by", "make_exchange"]

# Without a mask there is no order to fold in, and every strategy uses `AllGatherSum`.
EXCHANGES: dict[str, Strategy] = {
    "all_gather": all_gather.STRATEGY,
    "ring": chain.RING,
    "pipeline": chain.PIPELINE,
    "doubling": doubling.STRATEGY,
    "star": star.STRATEGY,
}


def choose(sp: SequenceParallel, *, state_bytes: int, transition_bytes: int = 0, final: bool = False) -> Choice:
    """Choose the strategy of a linear layer, the same on all ranks: `sp.linear`, or for "auto" the fastest on the link.

    A span's state [B,H,K,V] has `state_bytes`, the transition that is sent with it `transition_bytes`. With
    linear="auto" and no `sp.link`, the first call measures the link: all ranks make it together, at the start of a run.
    Later calls communicate nothing.
    """
    if sp.linear != "auto":
        return Choice(sp.linear)
    if sp.size == 1:
        return Choice("all_gather")
    link = sp.link or measure_link(sp.group)
    return choose_by(link, Sizes(sp.size, sp.layout, state_bytes, transition_bytes, final))


def choose_by(link: Link, sizes: Sizes) -> Choice:
    """Choose the fastest strategy on a link, baselines left out."""
    seconds = {name: strategy.seconds(link, sizes) for name, strategy in EXCHANGES.items() if not strategy.baseline}
    return Choice(min(seconds, key=lambda name: seconds[name]), link, seconds)


def make_exchange(shard: Shard, state: Tensor, transition: Tensor | None, request: Request) -> Exchange:
    """Make the exchange of a call with the summaries state [s,B,H,K,V] and transition [s,B,H(,K(,K))].

    The choice depends on their sizes alone, so a recomputation makes the same choice.
    """
    sent = 0 if transition is None or request.known_decays is not None else transition[0].nbytes
    final = request.needs_final_state
    name = choose(shard.sp, state_bytes=state[0].nbytes, transition_bytes=sent, final=final).strategy
    if name not in EXCHANGES:
        raise ValueError(f"linear={name!r} exchanges no states; take one of {', '.join(EXCHANGES)}, or auto")
    return EXCHANGES[name].make(shard, request)
