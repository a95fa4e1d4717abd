"""The checks that every public operator makes first, and the wrapper that keeps it out of autocast and torch.compile.

They refuse arguments that do not fit or that differ between ranks, before any communication.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast, get_args, get_type_hints

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
    return _guarded(function, get_type_hints(function))


def _guarded(function: Callable[P, R], hints: dict[str, Any]) -> Callable[P, R]:
    plain = {name for name, hint in hints.items() if Tensor not in (hint, *get_args(hint))}

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in plain & kwargs.keys():
            require(
                not isinstance(kwargs[name], Tensor),
                function.__name__,
                f"{name} must be {function.__annotations__[name]}, not a tensor, which would get no gradient; pass "
                f"{name}.item(), or multiply q by a scale that is learned",
            )
        with _no_autocast():
            return function(*args, **kwargs)

    return eager(run)


def run_steps(steps: Generator[None, None, R]) -> R:
    """Run an operator that is written in steps from begin to end, and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: R = end.value
            return result


class Started(Generic[R]):
    """The operator call whose exchange is in flight. `finish` returns its result, once.

    If it is dropped, what is in flight is drained.
    """

    def __init__(self, steps: Generator[None, None, R]) -> None:
        self._steps: Generator[None, None, R] | None = steps
        self._done: list[R] = []
        try:
            next(steps)
        except StopIteration as end:  # it had nothing to send
            self._done.append(end.value)

    @eager
    def finish(self) -> R:
        """Return the result, after the rest of the work. A second call raises RuntimeError."""
        if self._steps is None:
            raise RuntimeError("finished twice: an operator returns its result once")
        steps, self._steps = self._steps, None
        with _no_autocast():
            return self._done[0] if self._done else run_steps(steps)


class Operator(Protocol[P, R]):
    """The form of an operator that can be started and finished apart, so that two exchanges are in flight at once."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def start(self, *args: P.args, **kwargs: P.kwargs) -> Started[R]:
        """Compute and send what other ranks need. Every rank starts and finishes its operators in the same order."""


def operator_in_steps(steps: Callable[P, Generator[None, None, R]]) -> Operator[P, R]:
    """Make a public operator of a function that yields once, when its exchange is in flight."""

    @functools.wraps(steps)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        return run_steps(steps(*args, **kwargs))

    @functools.wraps(steps)
    def start(*args: P.args, **kwargs: P.kwargs) -> Started[R]:
        return Started(steps(*args, **kwargs))

    result = steps.__annotations__["return"].removeprefix("Generator[None, None, ").removesuffix("]")
    runs: list[Any] = [function, start]
    for run in runs:
        run.__annotations__ = steps.__annotations__ | {"return": result}
        run.__signature__ = inspect.signature(steps).replace(return_annotation=result)
        del run.__wrapped__
    hints = get_type_hints(steps)
    public = _guarded(function, hints)
    public.start = _guarded(start, hints)  # type: ignore[attr-defined]
    return cast(Operator[P, R], public)


@contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


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
