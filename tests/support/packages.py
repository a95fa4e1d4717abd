"""Packages that only some tests need: those are skipped by name where they are not installed, or hidden."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

import pytest


def needs(*packages: str) -> pytest.MarkDecorator:
    """The mark of tests that are skipped unless all are there. Packages are looked for and not imported, which can
    take seconds and patch what it finds."""
    missing = [
        name for name in packages if sys.modules.get(name, name) is None or importlib.util.find_spec(name) is None
    ]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def hide(*packages: str) -> None:
    """From now on these packages, not yet imported, are as if they were not installed, in this process."""
    assert not set(packages) & set(sys.modules), "already imported"
    sys.meta_path[:] = [_Without(finder, packages) for finder in sys.meta_path]


class _Without:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any, packages: tuple[str, ...]) -> None:
        self.finder, self.packages = finder, packages

    def find_spec(self, name: str, *args: Any) -> ModuleSpec | None:
        return None if name.partition(".")[0] in self.packages else self.finder.find_spec(name, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)
