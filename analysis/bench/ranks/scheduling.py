"""What the schedule hides, what the layout balances, and what does not grow with the sequence."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.bench.measure import Claim, Result, Sizes
from analysis.bench.ranks.launch import WAYS, Contender, Sample, loopback, measured, median, rows_of, slow

# Sized so that on one core of this project's machine a gather and the work beside it take 50 ms each, or more.
HIDDEN: dict[str, dict[str, Any]] = {
    "linear": {"layer": "linear", "heads": 16, "width": 128, "decay": "scalar", "length": 8192},
    "softmax": {"layer": "softmax", "heads": 8, "kv_heads": 1, "width": 64, "length": 8192},
}
LAYOUT = {"linear": "contiguous", "softmax": "zigzag"}


def overlap(sizes: Sizes, out: Path) -> Result:
    """Two ranks on a slow link, with and without overlap: how much of a gather is left to wait for."""
    contenders = [
        Contender(
            name=f"{kind}, overlap {words}", options={"overlap": on, "layout": LAYOUT[kind]}, **_cut(shape, sizes)
        )
        for kind, shape in HIDDEN.items()
        for on, words in ((True, "on"), (False, "off"))
    ]
    with slow(2, sizes.overlap_megabits) as net:
        samples = measured(contenders, sizes.overlap_repetitions, net)
    lines, claims = [], []
    for kind in HIDDEN:
        on, off = samples[f"{kind}, overlap on"], samples[f"{kind}, overlap off"]
        for way in WAYS:
            gather, left = _typical(off, way, "waited"), _typical(on, way, "waited")
            total_on, total_off = _typical(on, way, "seconds"), _typical(off, way, "seconds")
            work = total_off - gather
            saved = (total_off - total_on) / min(gather, work)
            lines.append(
                f"| {kind}, {way} | {gather * 1e3:.1f} | {work * 1e3:.1f} | {left * 1e3:.1f} | {left / gather:.2f} | "
                f"{total_off * 1e3:.1f} | {total_on * 1e3:.1f} | {saved:.2f} |"
            )
            claims.append(
                Claim(what=f"{kind}, {way}: part of the gather that is waited for", measured=left / gather, at_most=0.2)
            )
            shorter = min(gather, work) * 1e3
            claims.append(Claim(what=f"{kind}, {way}: ms of the gather or the work", measured=shorter, at_least=50))
    return Result(
        title=f"overlap, 2 ranks of one thread, fp32, {sizes.overlap_repetitions} repetitions; {net.words}",
        unit="seconds",
        header=(
            "| layer | gather ms | computing ms | waited ms with overlap | part of it | total ms off | total ms on "
            "| saved, of the shorter of both |\n|---|---|---|---|---|---|---|---|"
        ),
        lines=lines,
        rows=rows_of(contenders, samples),
        claims=claims,
    )


def _cut(shape: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    return shape | {"length": min(shape["length"], sizes.rank_length)}


def _typical(samples: list[Sample], way: str, what: str) -> float:
    """The median over repetitions of the mean over ranks."""
    return statistics.median(statistics.mean(getattr(one, what) for one in getattr(s, way)) for s in samples)


def balance(sizes: Sizes, out: Path) -> Result:
    """Causal softmax attention on two ranks: the zigzag layout gives both the same work."""
    contenders = [
        Contender(name=layout, layer="softmax", length=sizes.rank_length, options={"layout": layout})
        for layout in ("zigzag", "contiguous")
    ]
    with loopback(2) as net:
        samples = measured(contenders, sizes.model_repetitions, net)
    zigzag, contiguous = (median(samples[one.name], lambda s: s.seconds) for one in contenders)
    lines = [
        f"| {one.name} | {median(samples[one.name], lambda s: s.seconds) * 1e3:.0f} | "
        f"{' and '.join(f'{_of_rank(samples[one.name], rank) * 1e3:.0f}' for rank in range(2))} |"
        for one in contenders
    ]
    return Result(
        title=f"causal softmax, 2 ranks of one thread, {sizes.rank_length} tokens, H=4, D=64, fp32; {net.words}",
        unit="seconds",
        header="| layout | median ms | computing ms of rank 0 and rank 1 |\n|---|---|---|",
        lines=lines,
        rows=rows_of(contenders, samples),
        claims=[Claim(what="zigzag, times faster than contiguous", measured=contiguous / zigzag, at_least=1.35)],
    )


def _of_rank(samples: list[Sample], rank: int) -> float:
    """Seconds that a rank computes, waits left out."""
    ways = [[getattr(s, way)[rank] for way in WAYS] for s in samples]
    return statistics.median(sum(way.seconds - way.waited for way in both) for both in ways)


def flat(sizes: Sizes, out: Path) -> Result:
    """The time of a linear layer's exchange does not depend on the tokens of a rank; that of a softmax layer's does."""
    contenders = list(_growing(sizes))
    with slow(2, sizes.megabits) as net:
        samples = measured(contenders, sizes.rank_repetitions, net)

    def exchange(one: Contender) -> float:
        return median(samples[one.name], lambda s: sum(s.exchange(way) for way in WAYS))

    lines = [
        f"| {one.layer} | {one.length // 2} | {exchange(one) * 1e3:.1f} | "
        f"{samples[one.name][0].longest('forward', 'bytes') + samples[one.name][0].longest('backward', 'bytes'):,.0f} |"
        for one in contenders
    ]
    linear = [one for one in contenders if one.layer == "linear"]
    ratio = exchange(linear[-1]) / exchange(linear[0])
    draw_growth(contenders, {one.name: exchange(one) for one in contenders}, out / "flat.png", net.words)
    return Result(
        title=f"time of the exchange by tokens per rank, 2 ranks, no overlap, forward + backward; {net.words}",
        unit="seconds",
        header="| layer | tokens per rank | ms in the exchange | bytes received |\n|---|---|---|---|",
        lines=lines,
        rows=rows_of(contenders, samples),
        claims=[
            Claim(
                what=f"linear, time of the exchange at {linear[-1].length // 2} tokens per rank over "
                f"{linear[0].length // 2}",
                measured=ratio,
                at_most=1.2,
            )
        ],
    )


def _growing(sizes: Sizes) -> Iterator[Contender]:
    for tokens in sizes.tokens_per_rank:
        yield Contender(
            name=f"linear, {tokens}", layer="linear", length=2 * tokens, decay="scalar", options={"overlap": False}
        )
    for tokens in [tokens for tokens in sizes.tokens_per_rank if tokens <= sizes.rank_length // 2]:
        options = {"overlap": False, "layout": "zigzag"}
        yield Contender(
            name=f"softmax, {tokens}", layer="softmax", length=2 * tokens, kv_heads=1, options=options,
            repetitions=min(sizes.slow_repetitions, sizes.rank_repetitions),
        )  # fmt: skip


def draw_growth(contenders: list[Contender], seconds: dict[str, float], picture: Path, words: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for layer, marker in (("linear", "o"), ("softmax", "s")):
        here = [one for one in contenders if one.layer == layer]
        label = {"linear": "linear: all-gather of states", "softmax": "softmax: AllGather-KV, one key head"}[layer]
        axes.plot(
            [one.length // 2 for one in here], [seconds[one.name] * 1e3 for one in here], marker=marker, label=label
        )
    axes.set(
        xlabel="tokens per rank",
        ylabel="ms in the exchange, forward + backward",
        yscale="log",
        title=words,
    )
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)
