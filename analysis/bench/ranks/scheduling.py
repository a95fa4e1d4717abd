"""The schedule on two ranks: hidden gathers, balanced layouts, and the time of exchanges by length."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from analysis.bench.ranks.network import loopback, slow_link
from analysis.bench.ranks.samples import DIRECTIONS, Contender, Sample, median, rows_of, take_samples
from analysis.bench.result import Claim, Result
from analysis.bench.sizes import Sizes
from analysis.tables import Table

# On one core of this project's machine a gather of these sizes takes at least 50 ms, and so does the work during it.
HIDDEN: dict[str, dict[str, Any]] = {
    "linear": {"layer": "linear", "heads": 16, "width": 128, "decay": "scalar", "length": 16384},
    "softmax": {"layer": "softmax", "heads": 8, "kv_heads": 1, "width": 64, "length": 8192},
}
LAYOUT = {"linear": "contiguous", "softmax": "zigzag"}
EXCHANGES = {"linear": "linear: all-gather of states", "softmax": "softmax: AllGather-KV, one key head"}


def overlap(sizes: Sizes, out: Path) -> Result:
    """Measure the part of a gather that is still waited for with overlap, on two ranks with a slow link."""
    contenders = [
        Contender(
            name=f"{layer}, overlap {words}",
            options={"overlap": on, "layout": LAYOUT[layer]},
            **shape | {"length": min(shape["length"], sizes.rank_length)},
        )
        for layer, shape in HIDDEN.items()
        for on, words in ((True, "on"), (False, "off"))
    ]
    with slow_link(2, sizes.overlap_megabits) as network:
        samples = take_samples(contenders, sizes.overlap_repetitions, network)
    lines, claims = [], []
    for layer in HIDDEN:
        on, off = samples[f"{layer}, overlap on"], samples[f"{layer}, overlap off"]
        for direction in DIRECTIONS:
            name = f"{layer}, {direction}"
            gather, left = _typical(off, direction, "waited"), _typical(on, direction, "waited")
            total_on, total_off = _typical(on, direction, "seconds"), _typical(off, direction, "seconds")
            work = total_off - gather
            shorter = min(gather, work)
            times = [f"{seconds * 1e3:.1f}" for seconds in (gather, work, left, total_off, total_on)]
            saved = (total_off - total_on) / shorter
            lines.append((name, *times[:3], f"{left / gather:.2f}", *times[3:], f"{saved:.2f}"))
            claims += [
                Claim(what=f"{name}: part of the gather that is waited for", measured=left / gather, at_most=0.2),
                Claim(what=f"{name}: ms of the gather or the work", measured=shorter * 1e3, at_least=50),
            ]
    header = (
        "layer",
        "gather ms",
        "computing ms",
        "waited ms with overlap",
        "part of it",
        "total ms off",
        "total ms on",
        "saved, of the shorter of both",
    )
    return Result(
        title=f"overlap, 2 ranks of one thread, fp32, {sizes.overlap_repetitions} repetitions; {network.words}",
        unit="seconds",
        body=[Table(header=header, rows=tuple(lines), numbers=frozenset(header[1:]))],
        rows=rows_of(contenders, samples),
        claims=claims,
    )


def _typical(samples: list[Sample], direction: str, what: str) -> float:
    """Return the median over repetitions of the mean over ranks."""
    return statistics.median(statistics.mean(getattr(one, what) for one in getattr(s, direction)) for s in samples)


def balance(sizes: Sizes, out: Path) -> Result:
    """Compare causal softmax attention in the zigzag and in the contiguous layout, on two ranks."""
    contenders = [
        Contender(name=layout, layer="softmax", length=sizes.rank_length, options={"layout": layout})
        for layout in ("zigzag", "contiguous")
    ]
    network = loopback(2)
    samples = take_samples(contenders, sizes.model_repetitions, network)
    seconds = {name: median(own) for name, own in samples.items()}
    lines = tuple(
        (
            name,
            f"{seconds[name] * 1e3:.0f}",
            " and ".join(f"{_computing_seconds(own, rank) * 1e3:.0f}" for rank in range(2)),
        )
        for name, own in samples.items()
    )
    header = ("layout", "median ms", "computing ms of rank 0 and rank 1")
    ratio = seconds["contiguous"] / seconds["zigzag"]
    return Result(
        title=f"causal softmax, 2 ranks of one thread, {sizes.rank_length} tokens, H=4, D=64, fp32; {network.words}",
        unit="seconds",
        body=[Table(header=header, rows=lines, numbers=frozenset(header[1:]))],
        rows=rows_of(contenders, samples),
        claims=[Claim(what="zigzag, times faster than contiguous", measured=ratio, at_least=1.35)],
    )


def _computing_seconds(samples: list[Sample], rank: int) -> float:
    """Return the seconds that a rank computes in both directions, without its waits."""
    return statistics.median(
        sum(one.seconds - one.waited for one in (s.forward[rank], s.backward[rank])) for s in samples
    )


def exchange_vs_length(sizes: Sizes, out: Path) -> Result:
    """Measure the time of a layer's exchange from 4K to 64K tokens per rank, on two ranks with a slow link."""
    contenders = list(_growing(sizes))
    with slow_link(2, sizes.megabits) as network:
        samples = take_samples(contenders, sizes.rank_repetitions, network)
    series: dict[str, dict[int, float]] = {layer: {} for layer in EXCHANGES}  # ms by tokens per rank
    for one in contenders:
        series[one.layer][one.length // 2] = median(samples[one.name], attrgetter("exchange_seconds")) * 1e3
    lines = tuple(
        (
            one.layer,
            str(one.length // 2),
            f"{series[one.layer][one.length // 2]:.1f}",
            f"{samples[one.name][0].total('bytes'):,.0f}",
        )
        for one in contenders
    )
    header = ("layer", "tokens per rank", "ms in the exchange", "bytes received")
    (shortest, least), *_, (longest, most) = series["linear"].items()
    what = f"linear, time of the exchange at {longest} tokens per rank over {shortest}"
    return Result(
        title=f"time of the exchange by tokens per rank, 2 ranks, no overlap, forward + backward; {network.words}",
        unit="seconds",
        body=[Table(header=header, rows=lines, numbers=frozenset(header[1:]))],
        rows=rows_of(contenders, samples),
        claims=[Claim(what=what, measured=most / least, at_most=1.2)],
        figures={"exchange_vs_length.png": partial(_draw, series, network.words)},
    )


def _growing(sizes: Sizes) -> Iterator[Contender]:
    for tokens in sizes.tokens_per_rank:
        options: dict[str, Any] = {"overlap": False}
        yield Contender(name=f"linear, {tokens}", layer="linear", length=2 * tokens, decay="scalar", options=options)
    for tokens in [tokens for tokens in sizes.tokens_per_rank if tokens <= sizes.rank_length // 2]:
        options = {"overlap": False, "layout": "zigzag"}
        yield Contender(
            name=f"softmax, {tokens}", layer="softmax", length=2 * tokens, kv_heads=1, options=options,
            repetitions=min(sizes.slow_repetitions, sizes.rank_repetitions),
        )  # fmt: skip


def _draw(series: dict[str, dict[int, float]], title: str) -> bytes:
    """Draw the milliseconds of the exchange by tokens per rank, a line for each kind of layer."""
    from analysis import plots

    named = {EXCHANGES[layer]: values for layer, values in series.items()}
    return plots.growth(named, "tokens per rank", "ms in the exchange, forward + backward", title)
