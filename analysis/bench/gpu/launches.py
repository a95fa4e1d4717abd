"""The kernels that a call launches, and the bytes that they move, counted without a device: ours and fla-core's.

A process of its own runs the operators on the CPU at full size. Every launch of Triton is written down in place of
running, and every operation of torch runs. The rule for bytes is the same for both packages:

    a launch               each of its tensor arguments once, be it read, written or both
    an operation of torch  its inputs and its outputs once each; views and allocations move nothing

A kernel may read a tensor again, from the cache if it is there still, else from memory. This is left out, so a count
is a lower bound for a kernel. The sizes of tiles do not change it. Autotuned kernels take their first configuration,
and fla-core is told that programs may have a Hopper's shared memory. Decays are floored as on a device, by torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hybrid_sp as hsp
from analysis.bench.gpu.contenders import BOTH, DECAYS, FORWARD, Contender, draw_inputs, find_contenders, fla_contenders
from analysis.bench.gpu.operators import Cell
from analysis.bench.result import Result, Row
from analysis.bench.sizes import Sizes
from analysis.tables import Table
from hybrid_sp.checks import FLOORS

ROOT = Path(__file__).parents[3]
KERNELS = "hybrid_sp.kernels.gpu.linear"
LINEAR_ATTENTION, DELTA_RULE = "hybrid_sp.ops.linear_attention", "hybrid_sp.ops.delta_rule"
WAYS = ("forward", "backward")
DELTA = {"none": "chunk_delta_rule", "scalar": "chunk_gated_delta_rule", "vector": "chunk_kda"}


class Count(NamedTuple):
    """The launches of one pass of one operator by kernel, with bytes, and the operations of torch likewise.

    name  operator and pass, such as "linear, scalar, forward"
    """

    contender: str
    name: str
    launches: list[tuple[str, int]]
    operations: list[tuple[str, int]]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in [*self.launches, *self.operations])


def moved(x: Tensor) -> int:
    """Count the bytes of a tensor's numbers; numbers that a dim repeats count once."""
    numbers = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= size if stride else min(size, 1)
    return numbers * x.element_size()


class Counting(TorchDispatchMode):
    """Count launches and operations until they are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[str, int]] = []
        self.operations: list[tuple[str, int]] = []

    def launched(self, kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        """Write a launch down in place of running it."""
        tensors = {id(x): x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
        self.launches.append((kernel.fn.__name__, sum(map(moved, tensors.values()))))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns = [one.alias_info for one in func._schema.returns]
        name = func.overloadpacket.__name__
        view = any(alias is not None and not alias.is_write for alias in returns)
        if not view and not name.startswith(("empty", "new_empty", "detach", "lift", "_local_scalar")):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and not any(x is y for y in tensors)]
            if size := sum(map(moved, [*tensors, *made])):
                self.operations.append((name, size))
        return result

    def take(self) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """Return what was counted since it was last taken."""
        found = self.launches, self.operations
        self.launches, self.operations = [], []
        return found


def count(
    contender: str, name: str, call: Callable[..., Tensor], leaves: Sequence[Tensor], do: Tensor
) -> Iterator[Count]:
    """Count the forward and the backward pass of an operator."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpretedFunction

    counter = Counting()
    InterpretedFunction.run = lambda self, *args, **kwargs: counter.launched(self, *args, **kwargs)
    Autotuner.run = lambda self, *args, **kwargs: self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())
    with counter:
        o = call(*leaves)
        yield Count(contender, f"{name}, {WAYS[0]}", *counter.take())
        torch.autograd.grad(o, leaves, do)
        yield Count(contender, f"{name}, {WAYS[1]}", *counter.take())


def count_all(length: int, width: int, heads: int) -> list[Count]:
    """Count all operators in this process, whose Triton must be set to interpret."""
    has_fla = importlib.util.find_spec("fla") is not None
    if has_fla:
        vars(importlib.import_module("fla.utils"))["check_shared_mem"] = lambda *_: True  # before fla.ops asks it
    for module in (LINEAR_ATTENTION, DELTA_RULE):
        vars(importlib.import_module(module))["floor_decays"] = _floor_decays
    vars(importlib.import_module(KERNELS))["check_interpreter"] = lambda: None  # nothing will run
    forms, do = draw_inputs(heads, length, width, torch.bfloat16, torch.device("cpu"))
    ours, _ = find_contenders(torch.device("cpu"), 0)
    linear = [one for one in [*ours, *(fla_contenders() if has_fla else [])] if one.decay in DECAYS]
    found = [one for c in linear for one in count(c.name, f"linear, {c.decay}", c.call, forms[c.decay], do)]
    if has_fla:
        vars(importlib.import_module(DELTA_RULE))["select_backend"] = lambda *_: "fla"  # on a CPU too
        beta = torch.full(do.shape[:3], 0.5, requires_grad=True)
        for decay in DELTA:
            for name, call in (("ours", _our_delta), (f"fla {DELTA[decay]}", _fla_delta(decay))):
                leaves = [*forms[decay][:3], beta, *forms[decay][3:]]
                found += count(name, f"delta rule, {decay}", call, leaves, do)
    return found


def _floor_decays(name: str, log_decay: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Clip log decays as on a device, where `hybrid_sp.checks.floor_decays` does not look at them first."""
    return None if log_decay is None else log_decay.clamp(min=FLOORS[dtype])


def _our_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
    o = hsp.delta_rule(q, k, v, beta=beta, log_decay=g, backend="fla")
    assert isinstance(o, Tensor)
    return o


def _fla_delta(decay: str) -> Callable[..., Tensor]:
    import fla.ops

    operator = getattr(fla.ops, DELTA[decay])

    def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *g: Tensor) -> Tensor:
        return operator(q, k, v, beta=beta, **({"g": g[0]} if g else {}))[0]

    return call


def launches(sizes: Sizes, out: Path) -> Result:
    """Count the launches and bytes of our kernels and of fla-core's, without a device."""
    shape = sizes.kernels
    heads, length = shape.heads[0], shape.tuned_at
    missing = [name for name in ("triton", "fla") if importlib.util.find_spec(name) is None]
    counts: list[Count] = []
    if "triton" not in missing:
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", __name__, *map(str, (length, shape.width, heads))]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-4000:]}")
        counts = [Count(*one) for one in json.loads(run.stdout.splitlines()[-1])]
    notes = [f"skipped: {name} is not installed" for name in missing]
    return Result(
        title=f"launches and bytes of a call, counted, bf16, B=1, H={heads}, K=V={shape.width}, T={length}",
        unit="bytes",
        body=[
            Table(
                header=HEADER,
                rows=tuple(_compared(counts, heads, length, shape.width)),
                numbers=frozenset(HEADER[2:]),
            ),
            COUNTED,
            Table(header=EACH, rows=tuple(_each(counts)), numbers=frozenset()),
            *notes,
        ],
        rows=[Row(contender=f"{one.contender}, {one.name}", length=length, values=[one.bytes]) for one in counts],
        claims=[],
        facts={"counts": [one._asdict() for one in counts], "notes": notes},
    )


HEADER = (
    *("operator", "pass", "launches, ours", "launches, fla", "torch, ours", "torch, fla"),
    *("MB, ours", "MB, fla", "fla / ours", "least MB"),
)
EACH = ("operator", "pass", "of", "launches and operations of torch, MB each")
COUNTED = (
    "A launch counts each of its tensors once, and an operation of torch its inputs and outputs. What a kernel reads a "
    "second time is not counted, whether the cache holds it or not. Least: every input and output of the call once, "
    "without states."
)


def _compared(counts: Sequence[Count], heads: int, length: int, width: int) -> Iterator[tuple[str, ...]]:
    """Yield a line for each operator and pass, ours beside fla-core's."""
    by_name = {(one.name, one.contender.partition(",")[0].partition(" ")[0]): one for one in counts}
    for name in dict.fromkeys(one.name for one in counts):
        both = [by_name.get((name, package)) for package in ("ours", "fla")]
        sizes = [one.bytes if one else None for one in both]
        operator, _, way = name.rpartition(", ")
        yield (
            operator,
            way,
            *("" if one is None else str(len(one.launches)) for one in both),
            *("" if one is None else str(len(one.operations)) for one in both),
            *("" if size is None else f"{size / 1e6:,.0f}" for size in sizes),
            f"{sizes[1] / sizes[0]:.2f}" if sizes[0] and sizes[1] else "",
            f"{_least(operator, way, heads, length, width) / 1e6:,.0f}",
        )


def _least(operator: str, way: str, heads: int, length: int, width: int) -> float:
    """Return the bytes of an ideal pass; the delta rule has beta besides, and its gradient."""
    family, _, decay = operator.rpartition(", ")
    like = Contender(name="", decay=decay, call=torch.add)
    forward, both = (
        Cell(contender=like, heads=heads, length=length, passes=passes).work(width, 2)[0] for passes in (FORWARD, BOTH)
    )
    beta = 4 * heads * length if family else 0
    return forward + beta if way == WAYS[0] else both - forward + 2 * beta


def _each(counts: Sequence[Count]) -> Iterator[tuple[str, ...]]:
    """Yield a line for each count, with its launches and operations in order; those under 1 MB come as a number."""
    for one in counts:
        operator, _, way = one.name.rpartition(", ")
        all_ = [*one.launches, *((f"torch {name}", size) for name, size in one.operations)]
        words = [f"{name.strip('_').removesuffix('_kernel')} {size / 1e6:,.0f}" for name, size in all_ if size >= 1e6]
        small = sum(size < 1e6 for _, size in all_)
        yield operator, way, one.contender, ", ".join(words + [f"{small} small"] * (small > 0))


if __name__ == "__main__":
    print(json.dumps(count_all(*map(int, sys.argv[1:]))))
