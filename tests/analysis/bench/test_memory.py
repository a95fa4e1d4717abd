"""The meter of memory; softmax attention needs a fraction of it if key heads travel one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from analysis.bench.ranks.memory import AT_MOST, KEY_HEADS, KINDS, RANKS, WIDTH, Meter, Use, measure_all
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


def use_at(group: Any, lengths: list[int]) -> list[list[list[Use]]]:
    return measure_all(lengths, group)


def test_one_key_head_at_a_time_needs_a_third_of_the_memory() -> None:
    """All of it is proportional to the tokens, so that it is the same at 64K."""
    lengths = [128, 512]
    short, long = (dict(zip(KINDS, kinds, strict=True)) for kinds in run_ranks(use_at, RANKS, lengths)[0])
    for kind, (whole, one) in long.items():
        where = f"{kind}: {one} of {whole}"
        assert one.forward <= AT_MOST * whole.forward and one.backward <= AT_MOST * whole.backward, where
        for use, shorter in zip((whole, one), short[kind], strict=True):
            for most, less in ((use.kept, shorter.kept), (use.transient, shorter.transient)):
                assert most == pytest.approx(4 * less, rel=0.25), where  # a thread may free a buffer late
    gathered = 2 * lengths[1] * KEY_HEADS * WIDTH * 4
    for layout in LAYOUTS:
        for kept, again in zip(long[layout, True], long[layout, False], strict=True):
            assert kept.kept == again.kept + gathered and again.kept < gathered / 2
