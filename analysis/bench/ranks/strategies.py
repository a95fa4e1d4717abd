"""Every strategy on every kind of layer, ranks joined by a slow link, all in one run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.bench.measure import Claim, Result, Row, Sizes
from analysis.bench.ranks.launch import Contender, Samples, measured, median, rows_of, slow

RANKS = 4
LINEAR = ("all_gather", "ring", "pipeline", "doubling", "auto", "ulysses", "megatron", "ring_attention")
SOFTMAX = ("all_gather", "ring", "ulysses", "megatron")
FORMS: dict[str, dict[str, Any]] = {
    "linear, no decay": {"layer": "linear", "decay": "none"},
    "linear, decay [B,T,H]": {"layer": "linear", "decay": "scalar"},
    "delta rule, decay [B,T,H]": {"layer": "delta", "decay": "scalar"},
    "softmax": {"layer": "softmax", "kv_heads": 4},
}
BASIC = "linear, no decay"  # what the LASP-2 paper compares on
WORDS = {"megatron": "megatron (its volumes, inside the operator)"}
SLOW = ("megatron", "ring_attention")  # minutes, not milliseconds


def strategies(sizes: Sizes, out: Path) -> Result:
    """Tokens per second, bytes and exposed time of each, and the LASP-2 paper's margins."""
    contenders = list(_contenders(sizes))
    with slow(RANKS, sizes.megabits) as net:
        samples = measured(contenders, sizes.rank_repetitions, net)
    rows = rows_of(contenders, samples)
    draw(rows, out / "strategies.png", net.words)
    heads, width = contenders[0].heads, contenders[0].width
    return Result(
        title=(
            f"strategies, {RANKS} ranks of one thread, {sizes.rank_length} tokens, forward + backward, fp32, B=1, "
            f"H={heads}, K=V={width}; {net.words}"
        ),
        unit="seconds",
        header=HEADER,
        lines=[_line(one, samples, contenders) for one in contenders],
        rows=rows,
        claims=list(_claims(samples)),
    )


def _contenders(sizes: Sizes) -> Iterator[Contender]:
    for form, options in FORMS.items():
        softmax = options["layer"] == "softmax"
        for strategy in SOFTMAX if softmax else LINEAR:
            if strategy == "ring_attention" and options["layer"] == "delta":
                continue  # refused: the delta rule is no sum over earlier tokens
            slow_one = strategy in SLOW or softmax
            yield Contender(
                name=name(form, strategy),
                length=sizes.rank_length,
                options={"softmax" if softmax else "linear": strategy, "layout": "zigzag" if softmax else "contiguous"},
                repetitions=min(sizes.slow_repetitions, sizes.rank_repetitions) if slow_one else None,
                **options,
            )


def name(form: str, strategy: str) -> str:
    return f"{form}: {strategy}"


HEADER = (
    "| layer | strategy | median ms | fastest to slowest | tokens/s | exposed ms, forward + backward "
    "| received, forward | received, backward | collectives and messages |\n|---|---|---|---|---|---|---|---|---|"
)


def _line(one: Contender, samples: Samples, contenders: list[Contender]) -> str:
    mine = samples[one.name]
    form, strategy = one.name.split(": ")
    strategy = WORDS.get(strategy, strategy)
    times = [sample.seconds * 1e3 for sample in mine]
    here = median(mine, lambda s: s.seconds)
    exposed = [median(mine, lambda s, w=way: s.longest(w, "waited")) * 1e3 for way in ("forward", "backward")]  # type: ignore[misc]
    received = [int(median(mine, lambda s, w=way: s.longest(w, "bytes"))) for way in ("forward", "backward")]  # type: ignore[misc]
    calls = int(median(mine, lambda s: s.longest("forward", "calls") + s.longest("backward", "calls")))
    return (
        f"| {form} | {strategy} | {here * 1e3:.1f} | {min(times):.1f} to {max(times):.1f} | {one.length / here:,.0f} | "
        f"{exposed[0]:.1f} + {exposed[1]:.1f} | {received[0]:,} | {received[1]:,} | {calls} |"
    )


def _claims(samples: Samples) -> Iterator[Claim]:
    def seconds(form: str, strategy: str) -> float:
        return median(samples[name(form, strategy)], lambda s: s.seconds)

    def received(form: str, strategy: str) -> float:
        mine = samples[name(form, strategy)]
        return median(mine, lambda s: s.longest("forward", "bytes") + s.longest("backward", "bytes"))

    for form, bounds in ((BASIC, (1.15, 1.37)), ("linear, decay [B,T,H]", (1.15, 1.37))):
        for other, words, bound in (
            ("ring", "the ring of states, LASP", bounds[0]),
            ("ring_attention", "Ring Attention without the right product", bounds[1]),
        ):
            ratio = seconds(form, other) / seconds(form, "all_gather")
            yield Claim(what=f"{form}: tokens/s of LASP-2 over {words}", measured=ratio, at_least=bound)
    for form in FORMS:
        if form != "softmax":
            share = received(form, "pipeline") / received(form, "all_gather")
            what = f"{form}: bytes received in the pipeline over the all-gather's"
            yield Claim(what=what, measured=share, at_most=1 / (RANKS - 1))


def draw(rows: list[Row], picture: Path, words: str) -> None:
    """Median milliseconds of each strategy by kind of layer, from the fastest to the slowest sample."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(FORMS), 1, figsize=(8, 10), sharex=True, layout="constrained")
    for axes, form in zip(panels, FORMS, strict=True):
        here = {row.contender.split(": ")[1]: row for row in rows if row.contender.startswith(f"{form}: ")}
        for place, row in enumerate(here.values()):
            axes.plot([min(row.values) * 1e3, max(row.values) * 1e3], [place, place], color="0.6", linewidth=3)
            axes.plot(row.median * 1e3, place, "o", color="black")
            axes.annotate(f"{row.median * 1e3:,.0f}", (row.median * 1e3, place), (7, -3), textcoords="offset points")
        axes.set(title=form, xscale="log", yticks=range(len(here)), yticklabels=here, ylim=(len(here) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
    panels[-1].set(xlabel="ms, forward + backward; the line goes from the fastest to the slowest")
    panels[-1].margins(x=0.1)
    figure.suptitle(f"{RANKS} ranks; {words}")
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
