"""How ranks learn the state that enters their spans. One file per strategy, one line each here."""

from __future__ import annotations

from .all_gather import AllGather

EXCHANGES = {
    "all_gather": AllGather,
}
