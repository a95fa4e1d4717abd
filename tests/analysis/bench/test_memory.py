"""The meter of memory, and that softmax attention needs a fraction of it if key heads travel one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.bench.__main__ import main
from analysis.bench.ranks.memory import (
    AT_MOST,
    KEY_HEADS,
    KINDS,
    RANKS,
    WIDTH,
    Meter,
    Use,
    kernels_that_only_allocate,
    most,
)
from hybrid_sp.shard import LAYOUTS
from tests.support.ranks import run_ranks

KILO = 1024 * 4  # bytes of 1024 fp32


def test_the_meter_counts_what_is_alive() -> None:
    x = torch.zeros(1024)
    with Meter() as meter:
        y = x + 1
        view = y[:512].add_(1).detach()
        assert (meter.live, meter.peak) == (KILO, KILO)
        z = torch.cat([x, y]).sum()
        assert (meter.live, meter.peak) == (KILO + 4, 3 * KILO + 4)
        del y, z
        assert meter.live == KILO and view.numel() == 512
        del view
        meter.restart()
        x.detach().mul_(2)
        assert (meter.live, meter.peak) == (0, 0)


def test_the_meter_counts_what_backward_makes() -> None:
    x = torch.zeros(1024, requires_grad=True)
    with Meter() as meter:
        y = x.exp()  # kept for backward
        loss = y.sum()
        assert meter.live == KILO + 4
        meter.restart()
        (dx,) = torch.autograd.grad(loss, x)
        assert meter.peak >= 2 * KILO and meter.live >= KILO
        del y, loss
        assert meter.live == dx.nbytes


@pytest.mark.slow
def test_kernels_that_only_allocate_need_the_memory_of_real_ones() -> None:
    """In the zigzag layout the second span of one rank sees the first as if it were another's."""
    real = [most(None, 256, "zigzag", keep) for keep in (True, False)]
    with kernels_that_only_allocate():
        assert [most(None, 256, "zigzag", keep) for keep in (True, False)] == real


def uses(group: Any, length: int) -> list[list[Use]]:
    with kernels_that_only_allocate():
        return [most(group, length, layout, keep) for layout, keep in KINDS]


def test_one_key_head_at_a_time_needs_a_third_of_the_memory() -> None:
    """The same as at 64K tokens, `python -m analysis.bench memory`, for all of it is proportional to the tokens."""
    length = 1024
    found = dict(zip(KINDS, run_ranks(uses, RANKS, length)[0], strict=True))
    for kind, (whole, one) in found.items():
        where = f"{kind}: {one} of {whole}"
        assert one.forward <= AT_MOST * whole.forward and one.backward <= AT_MOST * whole.backward, where
    gathered = 2 * length * KEY_HEADS * WIDTH * 4
    for layout in LAYOUTS:
        for kept, again in zip(found[layout, True], found[layout, False], strict=True):
            assert kept.kept == again.kept + gathered and again.kept < gathered / 2


@pytest.mark.slow
def test_the_bench_measures_every_kind(tmp_path: Path) -> None:
    main(["memory", "--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "memory" / "results.json").read_text())
    assert len(results["rows"]) == 2 * len(KINDS)
    assert [claim["measured"] <= claim["at_most"] for claim in results["claims"]] == [True] * len(KINDS)
