"""The comparison of values that all ranks of a group must be given alike; it runs while the program goes on.

If ranks differ in such a value, they exchange tensors of different sizes, and fail or hang. If the sizes happen to
match, they go on with wrong numbers.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Mapping
from typing import Any

from . import collectives
from .groups import Group

_LONGEST = 100  # characters of a value that the error shows


class Agreement:
    """The comparison of named values. Its constructor launches it; every rank of the group makes it in the same
    order."""

    def __init__(self, given: Mapping[str, Any], group: Group) -> None:
        lines = [f"{name}={_shortened(repr(value))}" for name, value in given.items()]
        what = f"the comparison of sp.shard ({lines[0]}), which every rank of the group must call, in the same order"
        self._pending = collectives.start_texts("\n".join(lines), group, what)

    def require(self) -> None:
        """Wait for the other ranks, the first time; raise ValueError, on every rank and every time, if any differ."""
        if self._difference:
            raise ValueError(
                f"sp.shard: ranks of one group were given different arguments: {self._difference}. Give all of them "
                "the same length, cu_seqlens and settings of SequenceParallel"
            )

    @functools.cached_property
    def _difference(self) -> str:
        """Wait, and describe the values that differ, each with the ranks that have it; empty if none differs."""
        lines = (text.split("\n") for text in self._pending.wait())  # more or fewer if a rank compares something else
        columns = [column for column in itertools.zip_longest(*lines, fillvalue="nothing") if len(set(column)) > 1]
        ranks: dict[str, list[str]] = {}
        for rank, words in enumerate(zip(*columns, strict=True)):
            ranks.setdefault(", ".join(words), []).append(str(rank))
        return "; ".join(f"rank{'s'[: len(who) - 1]} {', '.join(who)}: {words}" for words, who in ranks.items())


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:60]} ... {text[-20:]} (crc32 {zlib.crc32(text.encode()):08x})"
