"""The strategies, each on every kind of layer, on ranks joined by a slow link, all in one run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from analysis.bench.ranks.network import slow_link
from analysis.bench.ranks.samples import DIRECTIONS, Contender, Samples, median, rows_of, take_samples
from analysis.bench.result import Claim, Result, Row
from analysis.bench.sizes import Sizes
from analysis.tables import Table
from hybrid_sp.shard import BASELINES, STATE_EXCHANGES

RANKS = 4
LINEAR = (*STATE_EXCHANGES, "auto", *BASELINES["linear"])
SOFTMAX = ("all_gather", *BASELINES["softmax"])
LAYERS: dict[str, dict[str, Any]] = {
    "linear, no decay": {"layer": "linear", "decay": "none"},
    "linear, decay [B,T,H]": {"layer": "linear", "decay": "scalar"},
    "delta rule, decay [B,T,H]": {"layer": "delta", "decay": "scalar"},
    "softmax": {"layer": "softmax", "kv_heads": 4},
}
MARGINS = {  # the LASP-2 paper's speed-ups of LASP-2 over other strategies
    "ring": ("the ring of states, LASP", 1.15),
    "ring_attention": ("Ring Attention without the right product", 1.37),
}
WORDS = {"megatron": "megatron (its volumes, inside the operator)"}
SLOW = ("megatron", "ring_attention")  # they take tens of seconds a call, not milliseconds


def strategies(sizes: Sizes, out: Path) -> Result:
    """Compare every exchange and baseline on every kind of layer, on four ranks with a slow link."""
    contenders = list(_contenders(sizes))
    with slow_link(RANKS, sizes.megabits) as network:
        samples = take_samples(contenders, sizes.rank_repetitions, network)
    rows = rows_of(contenders, samples)
    header = (
        "layer",
        "strategy",
        "median ms",
        "fastest to slowest",
        "tokens/s",
        "exposed ms, forward + backward",
        "received, forward",
        "received, backward",
        "collectives and messages",
    )
    return Result(
        title=(
            f"strategies, {RANKS} ranks of one thread, {sizes.rank_length} tokens, forward + backward, fp32, B=1, "
            f"H={contenders[0].heads}, K=V={contenders[0].width}; {network.words}"
        ),
        unit="seconds",
        body=[
            Table(
                header=header,
                rows=tuple(_cells(one, samples) for one in contenders),
                numbers=frozenset(header[2:]),
            )
        ],
        rows=rows,
        claims=list(_claims(samples)),
        figures={"strategies.png": partial(_draw, rows, f"{RANKS} ranks; {network.words}")},
    )


def _contenders(sizes: Sizes) -> Iterator[Contender]:
    for layer, options in LAYERS.items():
        softmax = options["layer"] == "softmax"
        for strategy in SOFTMAX if softmax else LINEAR:
            if strategy == "ring_attention" and options["layer"] == "delta":
                continue  # the operator refuses it: the delta rule is not a sum over earlier tokens
            slow = strategy in SLOW or softmax
            yield Contender(
                name=_name(layer, strategy),
                length=sizes.rank_length,
                options={"softmax" if softmax else "linear": strategy, "layout": "zigzag" if softmax else "contiguous"},
                repetitions=min(sizes.slow_repetitions, sizes.rank_repetitions) if slow else None,
                **options,
            )


def _name(layer: str, strategy: str) -> str:
    return f"{layer}: {strategy}"


def _cells(one: Contender, samples: Samples) -> tuple[str, ...]:
    own = samples[one.name]
    layer, strategy = one.name.split(": ")
    times = [sample.seconds * 1e3 for sample in own]
    exposed = [median(own, methodcaller("most", direction, "waited")) * 1e3 for direction in DIRECTIONS]
    received = [int(median(own, methodcaller("most", direction, "bytes"))) for direction in DIRECTIONS]
    return (
        layer,
        WORDS.get(strategy, strategy),
        f"{median(own) * 1e3:.1f}",
        f"{min(times):.1f} to {max(times):.1f}",
        f"{one.length / median(own):,.0f}",
        " + ".join(f"{waited:.1f}" for waited in exposed),
        *(f"{size:,}" for size in received),
        str(int(median(own, methodcaller("total", "calls")))),
    )


def _claims(samples: Samples) -> Iterator[Claim]:
    for layer in ("linear, no decay", "linear, decay [B,T,H]"):  # the paper compares on the first
        for other, (words, bound) in MARGINS.items():
            ratio = median(samples[_name(layer, other)]) / median(samples[_name(layer, "all_gather")])
            yield Claim(what=f"{layer}: tokens/s of LASP-2 over {words}", measured=ratio, at_least=bound)
    for layer in LAYERS:
        if layer != "softmax":
            pipeline, gather = (
                median(samples[_name(layer, strategy)], methodcaller("total", "bytes"))
                for strategy in ("pipeline", "all_gather")
            )
            what = f"{layer}: bytes received in the pipeline over the all-gather's"
            yield Claim(what=what, measured=pipeline / gather, at_most=1 / (RANKS - 1))


def _draw(rows: list[Row], title: str) -> bytes:
    """Draw the milliseconds of each strategy, a panel for each kind of layer."""
    from analysis import plots

    panels: dict[str, dict[str, list[float]]] = {layer: {} for layer in LAYERS}
    for row in rows:
        layer, strategy = row.contender.split(": ")
        panels[layer][strategy] = [seconds * 1e3 for seconds in row.values]
    return plots.ranges(panels, "ms, forward + backward; the line goes from the fastest to the slowest", title)
