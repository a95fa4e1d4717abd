"""What a sweep's models send: the cost model applied to their layers, beside what the ledger counted in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypeVar

from omegaconf import OmegaConf

from analysis import cost
from analysis.points import Point
from analysis.runs import Run
from analysis.tables import Table
from hybrid_sp.comm.link import Link
from hybrid_sp.exchange import auto
from hybrid_sp.shard import BASELINES
from layers.config import ModelConfig, block_specs, expand_pattern
from layers.cost import STATE_BYTES, Attention, Cost, Summary, gradient_all_reduce, halo_backward, halo_forward
from layers.registry import mixer_cost
from recipes.config import TrainConfig, recomputed_blocks

C = TypeVar("C", ModelConfig, TrainConfig)
LONG = 65_536  # a second length, for comparison
STATES = {  # what the exchanges of states are called in a table
    "all_gather": "all-gather of states, LASP-2",
    "ring": "ring of states, LASP-1",
    "pipeline": "ring of states in blocks, ZeCO",
    "doubling": "doubling of composed states",
}
TOKENS = {  # and the exchanges of tokens
    "all_gather": "AllGather-KV",
    "ring": "ring attention",
    "ring_attention": "ring attention by left product",
    "ulysses": "all-to-all of heads, Ulysses",
    "megatron": "gathers of all heads, Megatron-SP",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How one run is cut: P ranks in its sp group, n spans on each, B sequences in one pass, L tokens in a sequence.

    linear is the exchange of states, or "auto", and link the network by which that has chosen; softmax is the exchange
    of keys. Both may be a baseline.
    """

    P: int
    world: int
    spans: int
    B: int
    passes: int  # forward-backward passes in one step
    L: int
    kv_bytes: int
    linear: str = "all_gather"
    link: Link | None = None
    softmax: str = "all_gather"
    keep_kv: bool = True
    wide: int = 1  # 2 in fp64, where everything travels as in fp32 at twice the size
    recomputed: frozenset[int] = frozenset()  # blocks whose forward runs again in backward


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Bytes that one rank receives for one layer, in the forward and in the backward pass."""

    forward: int
    backward: int


def setting(run: Run) -> Setting:
    """Read from the run's resolved recipe and provenance how its sequences were cut."""
    recipe, dp, P = run.recipe, int(run.provenance["dp"]), int(run.provenance["sp"])
    layout, passes = recipe["parallel"]["layout"], int(recipe["train"]["accumulation"])
    zigzag = layout == "zigzag" or (layout == "auto" and "N" in run.pattern)
    B, L = int(recipe["train"]["batch"]) // dp // passes, int(recipe["data"]["length"])
    if recipe["data"].get("pack"):  # one row of documents, whose softmax layers receive at most what is said here
        B, L = 1, B * L
    train = _config(TrainConfig, recipe["train"])
    link = recipe["parallel"].get("link") or run.provenance.get("exchange", {}).get("link")
    return Setting(
        P=P,
        world=dp * P,
        spans=2 if zigzag else 1,
        B=B,
        passes=passes,
        L=L,
        kv_bytes=2 if train.dtype == "bfloat16" else 4,
        linear=recipe["parallel"]["linear"],
        link=Link(**link) if link else None,
        softmax=recipe["parallel"]["softmax"],
        keep_kv=recipe["parallel"].get("keep_kv", True),
        wide=2 if train.dtype == "float64" else 1,
        recomputed=frozenset(recomputed_blocks(model_config(run), train)),
    )


def layer_volumes(run: Run, cut: Setting) -> list[Volume]:
    """The predicted volume of every block's mixer in the run's model, on rank 0."""
    return [volume(facts, cut, again=number in cut.recomputed) for number, (_, facts) in enumerate(_layers(run))]


def exchanged(run: Run) -> int:
    """The predicted bytes that rank 0 receives in one step in the exchanges of all blocks."""
    cut = setting(run)
    if cut.P == 1:  # nor is there a link by which "auto" chooses
        return 0
    return cut.passes * sum(one.forward + one.backward for one in layer_volumes(run, cut))


def _layers(run: Run) -> list[tuple[str, Cost]]:
    """Every block's mixer by name, with its cost."""
    model = model_config(run)
    blocks = zip(expand_pattern(model), block_specs(model), strict=True)
    return [(name, mixer_cost(spec, context)) for name, (spec, context) in blocks]


def model_config(run: Run) -> ModelConfig:
    """The shape of the run's model."""
    return _config(ModelConfig, run.recipe["model"])


def _config(kind: type[C], values: Any) -> C:
    """A part of a recipe, with the defaults of what an older run did not know."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    assert isinstance(config, kind)
    return config


def volume(facts: Cost, cut: Setting, rank: int = 0, again: bool = False) -> Volume:
    """What one layer with these cost facts receives where sequences are cut so. `again`: its forward runs again in
    backward, where only the baselines that are another form of the operator communicate a second time."""
    forward = backward = repeated = 0
    ranks: dict[str, Any] = {"P": cut.P, "B": cut.B, "spans": cut.spans}
    for one in facts.summaries:
        there, back = _linear(one, cut, rank)
        forward, backward = forward + there, backward + back
        repeated += there * (cut.linear in BASELINES["linear"])
    halos = [(one.tokens, one.channels) for one in facts.halos]
    for keys in facts.attention:
        if keys.window is not None and _as_halo(keys, cut):
            halos.append((keys.window - 1, 2 * keys.kv_heads * keys.width))
            if not cut.keep_kv:
                halo = {**ranks, "rank": rank, "tokens": halos[-1][0], "channels": halos[-1][1]}
                backward += halo_forward(**halo, element_bytes=cut.kv_bytes)
            continue
        there, back = _softmax(keys, cut)
        forward, backward = forward + there, backward + back
        repeated += there * (cut.softmax != "all_gather")
    for tokens, channels in halos:
        halo = {**ranks, "rank": rank, "tokens": tokens, "channels": channels}
        forward += halo_forward(**halo, element_bytes=cut.kv_bytes)
        backward += halo_backward(**halo)
    return Volume(forward=cut.wide * (forward + again * repeated), backward=cut.wide * backward)


def _linear(summary: Summary, cut: Setting, rank: int) -> tuple[int, int]:
    ranks: dict[str, Any] = {"P": cut.P, "B": cut.B, "spans": cut.spans}
    chosen = exchange(summary, cut)
    if chosen in BASELINES["linear"]:
        state = _state(summary)
        del state["normalize"]  # it is summed where the queries are
        tokens: dict[str, Any] = {"L": cut.L, "G": summary.groups or summary.heads, "element_bytes": cut.kv_bytes}
        return cost.linear_baseline(chosen, **ranks, **state, **tokens, gates=summary.gates)
    return cost.linear_exchange(chosen, **ranks, **_state(summary), rank=rank)


def _softmax(keys: Attention, cut: Setting) -> tuple[int, int]:
    """Without the few tokens of a window, which are a halo."""
    heads = {"H": keys.heads, "G": keys.kv_heads, "D": keys.width}
    return cost.softmax_exchange(
        cut.softmax, P=cut.P, B=cut.B, L=cut.L, **heads, kv_bytes=cut.kv_bytes, keep_kv=cut.keep_kv
    )


def exchange(summary: Summary, cut: Setting) -> str:
    """The exchange of a linear layer with such summaries; "auto" chooses by the link, as the run has done."""
    if cut.linear != "auto":
        return cut.linear
    if cut.link is None:
        raise ValueError('the link by which linear="auto" has chosen is neither in the recipe nor in the provenance')
    state, transition = (cut.B * summary.heads * STATE_BYTES * cut.wide * n for n in summary.numbers)
    return auto.fastest(auto.seconds(cut.link, cut.P, cut.spans, state, transition, final=False))


def _as_halo(keys: Attention, cut: Setting) -> bool:
    """Whether only the tokens of a window travel."""
    return keys.window is not None and cut.softmax == "all_gather"


def _state(summary: Summary) -> dict[str, Any]:
    sizes = {"H": summary.heads, "K": summary.key, "V": summary.value}
    return {**sizes, "transition": summary.transition, "normalize": summary.normalize}


def cost_tables(points: Sequence[Point]) -> tuple[tuple[str, Table], ...]:
    """The report's two tables with the sentence above each: one layer by kind of exchange, and whole steps."""
    cut = setting(points[0].runs[0])
    if cut.P == 1:
        return ()
    return (_layer_table(points), _step_table(points))


def _layer_table(points: Sequence[Point]) -> tuple[str, Table]:
    cuts = [setting(point.runs[0]) for point in points]
    cut = max(cuts, key=lambda one: one.spans)
    strategies = [one for one in cuts if one.spans == cut.spans]
    kinds = dict(layer for point in points for layer in _layers(point.runs[0]))
    full = next((one for facts in kinds.values() for one in facts.attention if one.window is None), None)
    rows, notes = [], []

    def row(name: str, exchange: str, at: Sequence[int]) -> None:
        rows.append((name, exchange, *(f"{value:,}" for value in at)))

    def volumes(facts: Cost, cut: Setting) -> list[int]:
        """Forward and backward at both lengths, on the rank that receives the most."""
        return [
            max(getattr(volume(facts, replace(cut, L=length), rank), way) for rank in range(cut.P))
            for length in (cut.L, LONG)
            for way in ("forward", "backward")
        ]

    for name, facts in sorted(kinds.items(), key=lambda item: (item[0] == "softmax", item[0])):
        for used, each in {_used(facts, one): one for one in strategies}.items():
            row(name, f"{used} (used here)", volumes(facts, each))
        for one in facts.attention:
            if one.window is None and all(other.softmax != "ring" for other in strategies):
                row(name, TOKENS["ring"], volumes(Cost(attention=(one,)), replace(cut, softmax="ring")))
        chosen = {exchange(one, each) for one in facts.summaries for each in strategies}
        for other in [other for other in STATES if facts.summaries and other not in chosen]:
            row(name, STATES[other], volumes(Cost(summaries=facts.summaries), replace(cut, linear=other)))
        for summary in facts.summaries:
            if full is not None:
                tokens = cost.break_even_tokens(
                    H=summary.heads,
                    K=summary.key,
                    V=summary.value,
                    transition=summary.transition,
                    spans=cut.spans,
                    kv_bytes=cut.kv_bytes,
                    G=full.kv_heads,
                    D=full.width,
                )
                notes.append(f"{name} receives less than softmax above {cut.P * tokens:,.0f} tokens")
    header = ("layer", "exchange", *(f"{way}, {L:,} tokens" for L in (cut.L, LONG) for way in ("forward", "backward")))
    text = (
        f"Cost model: bytes that the busiest rank of {cut.P} receives for one layer, {cut.B} sequences a pass, "
        f"{cut.spans} spans on a rank. " + ("Forward, by all-gather, " + "; ".join(notes) + "." if notes else "")
    )
    return text, Table(header=header, rows=tuple(rows), numbers=frozenset(header[2:]))


def _used(facts: Cost, cut: Setting) -> str:
    """What the exchanges of a layer are called."""
    chosen = [exchange(one, cut) for one in facts.summaries]
    again = "" if cut.keep_kv or cut.softmax != "all_gather" else ", again in backward"
    return " and ".join(
        [
            *[(TOKENS if one in BASELINES["linear"] else STATES)[one] for one in chosen],
            *[f"{TOKENS[cut.softmax]}{again}" for one in facts.attention if not _as_halo(one, cut)],
            *["halo" for _ in facts.halos],
            *[f"halo{again}" for one in facts.attention if _as_halo(one, cut)],
        ]
    )


def _step_table(points: Sequence[Point]) -> tuple[str, Table]:
    rows = []
    for point in points:
        run = point.runs[0]
        counted, exchanges = median(row.received_bytes for row in run.train), exchanged(run)
        cut = setting(run)
        gradients = cut.wide * gradient_all_reduce(P=cut.world, parameters=run.parameters)
        rows.append(
            (
                *point.strategy.values(),
                str(point.softmax),
                point.linear or "none (all softmax)",
                f"{exchanges:,}",
                f"{gradients:,}",
                f"{exchanges + gradients:,}",
                f"{counted:,.0f}",
                f"{counted - exchanges - gradients:+,.0f}",
            )
        )
    header = (
        "softmax share",
        "linear blocks",
        "exchanges (model)",
        "gradients (model)",
        "sum (model)",
        "counted by the ledger",
        "difference",
    )
    text = (
        "Bytes that rank 0 receives in one training step, by the cost model and as counted (median step). "
        "Sums of losses, token counts and the like are not modelled."
    )
    numbers = frozenset({*header} - {"linear blocks"})
    return text, Table(header=(*points[0].strategy, *header), rows=tuple(rows), numbers=numbers)
