"""The delta rule by the passes of fla-core (`kernels/gpu/fla_delta.py`) on P ranks against the token loop, without a
GPU: the cases that the arguments name, or all.

fla's own kernels run in Triton's interpreter. Two things keep them from it as they are, and are changed here:
autotuning needs a driver, so every kernel gets the last of its configurations; and `.to` of the index of a loop, which
in the interpreter is a Python int.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import groups
from hybrid_sp.kernels.gpu import fla_delta
from hybrid_sp.ops import delta_rule
from tests.external.program import Errors, report
from tests.hybrid_sp.cases import LONG_DOCUMENTS, SHORT_DOCUMENTS, Case, measured, truth
from tests.support.interpreter import patch_once
from tests.support.oracle import relative
from tests.support.ranks import close_pool, run_ranks

Named = tuple[str, Case, int]  # a case, what it is called, and tokens in a chunk


def interpret() -> None:
    """Make fla's kernels run in the interpreter, and the delta rule use them. Before anything imports fla."""
    patch_once()
    import triton.language as tl
    from triton.runtime.autotuner import Autotuner

    init = Autotuner.__init__

    def with_one_configuration(self: Any, fn: Any, names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        init(self, fn, names, configs[-1:], *args, **kwargs)

    class Index(int):
        def to(self, dtype: Any) -> Any:
            return tl.cast(int(self), dtype)

    Autotuner.__init__ = with_one_configuration
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        from fla.ops.common import chunk_delta_h
    chunk_delta_h.range = lambda *bounds: (Index(i) for i in range(*bounds))
    delta_rule.select_backend = lambda *_: "fla"


def cases(world: int) -> list[Named]:
    """P = 1 without an exchange, of a batch and of documents, and with states; P = 2, 3: both layouts, spans of several
    chunks, documents that begin inside and at the edges of spans. The interpreter takes its time, for vector decays the
    most: so few of each."""
    delta, gated, kda = (Case(operator="delta", decay=d, groups=1, heads=2) for d in (None, "scalar", "vector"))
    short, long = {"documents": SHORT_DOCUMENTS}, {"documents": LONG_DOCUMENTS, "states": True}
    half = replace(gated, length=80, states=True)
    return {
        1: [
            ("delta alone", replace(delta, length=70), 64),
            ("gated alone, states", replace(gated, length=70, groups=2, states=True), 64),
            ("gated alone, documents", replace(gated, **short), 32),
            ("kda alone, documents", replace(kda, documents=(0, 1, 2, 35, 40), length=40), 32),
            ("kda alone, states", replace(kda, length=36, groups=2, states=True), 32),
            ("strong, gated", replace(gated, length=40, groups=2, states=True, strong="some"), 32),
            ("strong, kda", replace(kda, length=24, heads=1, states=True, strong="some"), 32),
            ("half", half, 32),
        ],
        2: [
            ("delta on 2, zigzag, documents", replace(delta, layout="zigzag", **short), 32),
            ("gated on 2, states", replace(gated, length=83, states=True), 32),
            ("half, on 2", half, 32),
            (
                "kda on 2, zigzag, documents, states",
                replace(kda, layout="zigzag", documents=(0, 5, 60, 67), length=67, states=True),
                32,
            ),
        ],
        3: [
            ("delta on 3, states", replace(delta, length=80, groups=2, states=True), 64),
            ("gated on 3, documents, states", replace(gated, **long), 32),
            ("kda on 3, zigzag", replace(kda, layout="zigzag", length=37), 64),
        ],
    }[world]


def dtype_of(name: str) -> torch.dtype:
    """fp16 for what numpy, in which the interpreter computes, does not have: bf16."""
    return torch.float16 if name.startswith("half") else torch.float32


def rank_errors(group: Any, named: list[Named], wanted: list[dict[str, Tensor]]) -> Errors:
    """Of every case the relative error of every tensor on this rank; and under "order" how many exchanges were launched
    after the work that hides them began, and whether there was one though none is needed, or none though one is."""
    if "fla" not in sys.modules:
        interpret()
    torch.set_num_threads(1)
    found: Errors = {}
    for (name, case, chunk), want in zip(named, wanted, strict=True):
        fla_delta.CHUNK = chunk
        shard = hsp.SequenceParallel(group, layout=case.layout).shard(case.length, case.documents)
        with hsp.ledger() as book:
            got = measured(case, group, dtype_of(name))
        found[name] = {}
        for key, value in got.items():
            expected = want[key] if value.shape == want[key].shape else shard.take(want[key])
            error = relative(value, expected)
            found[name][key] = math.inf if math.isnan(error) else error  # so that max() below does not lose it
        needed = groups.size(group) > 1
        for direction in ("forward", "backward"):
            launched = [x.launched for x in book.rows if (x.tag, x.direction) == ("linear", direction)]
            begin = next(x.begin for x in book.phases if (x.name, x.direction) == ("intra", direction))
            late = [moment for moment in launched if moment > begin]
            found[name][f"order {direction}"] = len(late) + abs(bool(launched) - needed)
    return found


def main(chosen: Sequence[str]) -> None:
    torch.use_deterministic_algorithms(True)
    os.environ["TRITON_INTERPRET"] = "1"  # for the ranks: triton reads it when it is imported
    found: Errors = {}
    for world in (3, 2, 1):  # the ranks of all start at once
        named = [(name, case, chunk) for name, case, chunk in cases(world) if not chosen or name in chosen]
        if not named:
            continue
        wanted = [truth(case, dtype_of(name)) for name, case, _ in named]
        for errors in run_ranks(rank_errors, world, named, wanted, deadline=300):
            for name, tensors in errors.items():
                worst = found.setdefault(name, {})
                worst.update({key: max(error, worst.get(key, 0.0)) for key, error in tensors.items()})
    close_pool()
    report(found)


if __name__ == "__main__":
    main(sys.argv[1:])
