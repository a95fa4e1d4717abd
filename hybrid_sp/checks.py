"""The checks that every public operator makes first, and the wrapper that keeps it out of autocast and torch.compile.

They refuse arguments that do not fit or that differ between ranks, before any communication.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from .eager import eager
from .shard import SequenceParallel, Shard

P = ParamSpec("P")
R = TypeVar("R")

# Floors of log decays: exp(floor) is 0, and every float dtype can hold the floor.
FLOORS = {torch.float32: -104.0, torch.float64: -768.0}


def public_operator(function: Callable[P, R]) -> Callable[P, R]:
    """Run with autocast off and outside torch.compile's graph: one graph break, the order of collectives kept.

    Raises ValueError if a keyword that takes no tensor is given one: autograd would not see it.
    """
    plain = {name for name, hint in get_type_hints(function).items() if Tensor not in (hint, *get_args(hint))}

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in plain & kwargs.keys():
            require(
                not isinstance(kwargs[name], Tensor),
                function.__name__,
                f"{name} must be {function.__annotations__[name]}, not a tensor, which would get no gradient; pass "
                f"{name}.item(), or multiply q by a scale that is learned",
            )
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return eager(run)


def require(condition: bool, name: str, message: str) -> None:
    """Raise ValueError naming the operator unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: {message}")


def require_recurrence(name: str, q: Tensor, k: Tensor, v: Tensor, shard: Shard) -> None:
    """Check q, k [B,T,G,K] and v [B,T,H,V] of a recurrence on states."""
    require(q.ndim == k.ndim == v.ndim == 4, name, "q, k and v must be [batch, tokens, heads, dim]")
    require(q.shape == k.shape, name, f"q and k must have one shape, got {tuple(q.shape)} and {tuple(k.shape)}")
    require(
        q.shape[:2] == v.shape[:2], name, f"v {tuple(v.shape)} must have the batch and tokens of q {tuple(q.shape)}"
    )
    require(
        v.shape[2] % q.shape[2] == 0, name, f"v has {v.shape[2]} heads, not a multiple of the {q.shape[2]} key heads"
    )
    require(q.dtype == k.dtype == v.dtype, name, f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    require(q.dtype.is_floating_point, name, f"q, k, v must be floating point, got {q.dtype}")
    shard.require_tokens(name, q=q.shape[1])
    shard.require_batch(name, q)


def require_state(name: str, state: tuple[Tensor, ...], shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    """Check that an initial state has these shapes and the dtype of states."""
    given = [tuple(part.shape) for part in state]
    require(given == shapes, name, f"initial_state must have the shapes {shapes}, got {given}")
    dtypes = [part.dtype for part in state]
    require(set(dtypes) == {dtype}, name, f"initial_state must be {dtype}, got {dtypes}")


def default_shard(shard: Shard | None, x_BTHD: Tensor) -> Shard:
    """Return the shard once all ranks agree on it; without one, a shard for one device that holds all tokens of x."""
    if shard is None:
        return Shard(SequenceParallel(None), x_BTHD.shape[1])
    shard.require_agreement()
    return shard


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states, decays and sums: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def floor_decays(name: str, log_decay: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Clip log decays at the floor of `dtype`, the dtype of sums.

    A decay below the floor becomes exactly 0, with a gradient of 0. Sums of log decays therefore stay small enough that
    a difference of two keeps its digits.

    Raises ValueError for -inf on a CPU. Elsewhere the host must not wait for values, and -inf becomes the floor too.
    """
    if log_decay is None:
        return None
    if log_decay.device.type == "cpu":
        lowest = log_decay.detach().amin().item()
        require(lowest != float("-inf"), name, "log_decay must be finite, got -inf; -1e4 decays to exactly 0 as well")
        if lowest >= FLOORS[dtype]:
            return log_decay  # the common case, without a copy
    return log_decay.clamp(min=FLOORS[dtype])
