"""The two tiers of tests: what `make test` runs, and what `make test-all` runs besides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def tiered(first: Iterable[Any], slow: Iterable[Any]) -> list[Any]:
    """Values for pytest.mark.parametrize: the first tier's as they are, and others marked slow. A tuple is of several
    arguments."""
    rest = (value if isinstance(value, tuple) else (value,) for value in slow)
    return [*first, *(pytest.param(*value, marks=pytest.mark.slow) for value in rest)]
