"""What a sweep's models send: the cost model applied to their layers, beside what the ledger counted in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from analysis import cost
from analysis.runs import Run
from analysis.tables import Point, Table
from layers.cost import Cost, Summary
from layers.spec import ModelConfig, block_specs, expand_pattern

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
LONG = 65_536  # a second length, for comparison


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How one run is cut: P ranks in its sp group, n spans on each, B sequences in one pass, L tokens in a sequence."""

    P: int
    world: int
    spans: int
    B: int
    passes: int  # forward-backward passes in one step
    L: int
    kv_bytes: int


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
    return Setting(
        P=P,
        world=dp * P,
        spans=2 if zigzag else 1,
        B=B,
        passes=passes,
        L=L,
        kv_bytes=DTYPE_BYTES[recipe["train"]["dtype"]],
    )


def layer_volumes(run: Run, cut: Setting) -> list[Volume]:
    """The predicted volume of every block's mixer in the run's model, on rank 0."""
    return [volume(facts, cut) for _, facts in _layers(run)]


def _layers(run: Run) -> list[tuple[str, Cost]]:
    """Every block's mixer by name, with its cost."""
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), run.recipe["model"]))
    assert isinstance(model, ModelConfig)
    blocks = zip(expand_pattern(model), block_specs(model), strict=True)
    return [(name, spec.cost(place)) for name, (spec, place) in blocks]


def volume(facts: Cost, cut: Setting, rank: int = 0) -> Volume:
    """What one layer with these cost facts sends where sequences are cut so."""
    forward = backward = 0
    ranks: dict[str, Any] = {"P": cut.P, "B": cut.B, "spans": cut.spans}
    for one in facts.summaries:
        forward += cost.linear_all_gather_forward(**ranks, **_state(one), transition=one.transition)
        backward += cost.linear_all_gather_backward(**ranks, **_state(one))  # the transition is not sent back
    halos = [(one.tokens, one.channels) for one in facts.halos]
    for keys in facts.attention:
        shape: dict[str, Any] = {
            "P": cut.P,
            "B": cut.B,
            "L": cut.L,
            "kv_bytes": cut.kv_bytes,
            "G": keys.kv_heads,
            "D": keys.width,
        }
        if keys.window is None:
            forward += cost.softmax_all_gather_forward(**shape)
            backward += cost.softmax_all_gather_backward(**shape)
        else:
            halos.append((keys.window - 1, 2 * keys.kv_heads * keys.width))
    for tokens, channels in halos:
        halo = {**ranks, "rank": rank, "tokens": tokens, "channels": channels}
        forward += cost.halo_forward(**halo, element_bytes=cut.kv_bytes)
        backward += cost.halo_backward(**halo)
    return Volume(forward=forward, backward=backward)


def _state(summary: Summary) -> dict[str, Any]:
    return {"H": summary.heads, "K": summary.key, "V": summary.value, "normalize": summary.normalize}


def cost_tables(points: Sequence[Point]) -> tuple[tuple[str, Table], ...]:
    """The report's two tables with the sentence above each: one layer by kind of exchange, and whole steps."""
    cut = setting(points[0].runs[0])
    if cut.P == 1:
        return ()
    return (_layer_table(points), _step_table(points))


def _layer_table(points: Sequence[Point]) -> tuple[str, Table]:
    cut = max((setting(point.runs[0]) for point in points), key=lambda one: one.spans)
    kinds = dict(layer for point in points for layer in _layers(point.runs[0]))
    full = next((one for facts in kinds.values() for one in facts.attention if one.window is None), None)
    rows, notes = [], []

    def row(name: str, exchange: str, *at: int) -> None:
        rows.append((name, exchange, *(f"{value:,}" for value in at)))

    for name, facts in sorted(kinds.items(), key=lambda item: (item[0] == "softmax", item[0])):
        volumes = [volume(facts, replace(cut, L=length)) for length in (cut.L, LONG)]
        used = " and ".join(
            [
                *["all-gather of states, LASP-2" for _ in facts.summaries],
                *["AllGather-KV" for one in facts.attention if one.window is None],
                *["halo" for one in (*facts.halos, *facts.attention) if getattr(one, "window", 0) is not None],
            ]
        )
        row(name, f"{used} (used here)", *(bytes_ for one in volumes for bytes_ in (one.forward, one.backward)))
        for one in facts.attention:
            if one.window is None:
                shape = {"P": cut.P, "B": cut.B, "kv_bytes": cut.kv_bytes, "G": one.kv_heads, "D": one.width}
                ring = (cost.ring_attention_forward, cost.ring_attention_backward)
                row(name, "ring attention", *(f(L=L, **shape) for L in (cut.L, LONG) for f in ring))
        for summary in facts.summaries:
            sizes = {"H": summary.heads, "K": summary.key, "V": summary.value}
            row(name, "ring of states, LASP-1", *4 * (cost.lasp1_ring(P=cut.P, B=cut.B, **sizes),))
            if full is not None:
                tokens = cost.break_even_tokens(
                    **sizes,
                    transition=summary.transition,
                    spans=cut.spans,
                    kv_bytes=cut.kv_bytes,
                    G=full.kv_heads,
                    D=full.width,
                )
                notes.append(f"{name} receives less than softmax above {cut.P * tokens:,.0f} tokens")
    header = ("layer", "exchange", *(f"{way}, {L:,} tokens" for L in (cut.L, LONG) for way in ("forward", "backward")))
    text = (
        f"Cost model: bytes that one rank of {cut.P} receives for one layer, {cut.B} sequences a pass, "
        f"{cut.spans} spans on a rank. " + ("Forward, " + "; ".join(notes) + "." if notes else "")
    )
    return text, Table(header=header, rows=tuple(rows), numbers=frozenset(header[2:]))


def _step_table(points: Sequence[Point]) -> tuple[str, Table]:
    rows = []
    for point in points:
        run = point.runs[0]
        cut, counted = setting(run), median(row.received_bytes for row in run.train)
        exchanges = cut.passes * sum(one.forward + one.backward for one in layer_volumes(run, cut))
        gradients = cost.gradient_all_reduce(P=cut.world, parameters=run.parameters)
        rows.append(
            (
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
    return text, Table(header=header, rows=tuple(rows), numbers=frozenset({*header} - {"linear blocks"}))
