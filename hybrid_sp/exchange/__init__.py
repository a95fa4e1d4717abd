"""How ranks learn the state that enters their spans. One file per strategy, one line each here."""

from __future__ import annotations

from typing import NamedTuple

from .all_gather import AllGather, AllGatherSum


class Strategy(NamedTuple):
    """The exchange of a causal operator, and that of one without a mask."""

    causal: type[AllGather]
    bidirectional: type[AllGatherSum]


EXCHANGES = {
    "all_gather": Strategy(AllGather, AllGatherSum),
}
