"""The interception of our kernels' launches: a function of the caller takes the place of `launch` everywhere."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hybrid_sp.kernels import gpu


@contextmanager
def in_place_of_launch(replacement: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Let every file of kernels call this function with the arguments of `launch`, and yield `launch` itself."""
    modules: list[Any] = [
        importlib.import_module(f"{gpu.__name__}.{one.name}") for one in pkgutil.iter_modules(gpu.__path__)
    ]
    real = next(module.launch for module in modules if module.__name__.endswith(".launch"))
    holders = [module for module in modules if getattr(module, "launch", None) is real]
    for module in holders:
        module.launch = replacement
    try:
        yield real
    finally:
        for module in holders:
            module.launch = real
