"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """`old`, which stands once in `file`, replaced by `new`, must make `test` (a pytest id) fail."""

    name: str
    file: str
    old: str
    new: str
    test: str
