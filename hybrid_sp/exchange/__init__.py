"""How ranks learn the state that enters their spans. One file per strategy, one line each here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..overlap import Exchange
from ..shard import Shard
from .all_gather import AllGather, AllGatherSum
from .auto import BLOCKS, choose
from .chain import Chain
from .doubling import Doubling
from .scan import Scanned

__all__ = ["EXCHANGES", "AllGatherSum", "choose", "make_exchange"]

# Made of a shard, the log decays of all spans if every rank knows them, whether an initial state is given, and whether
# the final state is wanted. Without a mask there is no order to fold in, and every strategy uses `AllGatherSum`.
EXCHANGES: dict[str, Callable[[Shard, Tensor | None, bool, bool], Exchange]] = {
    "all_gather": AllGather,
    "ring": partial(Scanned, name="ring", travel=partial(Chain, blocks=1), aside=False),
    "pipeline": partial(Scanned, name="pipeline", travel=partial(Chain, blocks=BLOCKS), aside=True),
    "doubling": partial(Scanned, name="doubling", travel=Doubling, aside=True),
}


def make_exchange(
    shard: Shard, state: Tensor, transition: Tensor | None, *, known: Tensor | None, entered: bool, final: bool
) -> Exchange:
    """The exchange of a call with the summaries state [s,B,H,K,V] and transition [s,B,H(,K(,K))]: that of `sp.linear`,
    for "auto" the one that these shapes choose, so that a recomputation chooses the same."""
    sent = 0 if transition is None or known is not None else transition[0].nbytes
    choice = choose(shard.sp, state_bytes=state[0].nbytes, transition_bytes=sent, final=final)
    return EXCHANGES[choice.strategy](shard, known, entered, final)
