"""What every public operator does first: leave autocast and torch.compile, and refuse what does not fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .layout import Shard
from .mesh import SequenceParallel

P = ParamSpec("P")
R = TypeVar("R")


def operator(function: Callable[P, R]) -> Callable[P, R]:
    """Run with autocast off and outside torch.compile's graph: one graph break, the order of collectives kept."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return torch.compiler.disable(run)


def require(condition: bool, name: str, message: str) -> None:
    """Raise ValueError naming the operator unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: {message}")


def shard_of(shard: Shard | None, x_BTHD: Tensor) -> Shard:
    """The shard, or for one device the one that holds all tokens of x."""
    return SequenceParallel(None).shard(x_BTHD.shape[1]) if shard is None else shard


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of states, decays and sums: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
