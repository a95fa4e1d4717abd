"""The decorator that keeps a function out of the graphs of torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Let a graph break once at each call of the function, so that collectives keep their order.

    `torch.compiler.disable` does the same, but imports the compiler at once: a second in every process. This imports it
    when a caller is compiled.
    """
    disabled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return run
