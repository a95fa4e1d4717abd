"""What a sweep's models send: the cost model applied to their layers, beside what the ledger counted in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from analysis import cost
from analysis.runs import Run
from analysis.tables import Point, Table
from layers.recurrence import Form
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
    return Setting(
        P=P,
        world=dp * P,
        spans=2 if zigzag else 1,
        B=int(recipe["train"]["batch"]) // dp // passes,
        passes=passes,
        L=int(recipe["data"]["length"]),
        kv_bytes=DTYPE_BYTES[recipe["train"]["dtype"]],
    )


def layer_volumes(run: Run, cut: Setting) -> list[Volume | None]:
    """The predicted volume of every block of the run's model, None for a mixer that has no model here."""
    return [_volume(name, sizes, cut) for name, sizes in _layers(run)]


def _layers(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """Every block's mixer by name, with the sizes that the formulas of the cost model take."""
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), run.recipe["model"]))
    assert isinstance(model, ModelConfig)
    layers = []
    for name, (spec, place) in zip(expand_pattern(model), block_specs(model), strict=True):
        sizes: dict[str, Any] = {}
        if name == "softmax":
            sizes = {"G": place.kv_heads, "D": place.width()}
        elif isinstance(form := getattr(spec, "form", lambda _: None)(place), Form):
            sizes = {"H": form.heads, "K": form.key, "V": form.value, "normalize": form.normalize}
            sizes["transition"] = form.decay
        layers.append((name, sizes))
    return layers


def _volume(name: str, sizes: dict[str, Any], cut: Setting) -> Volume | None:
    if name == "softmax":
        shape = {"P": cut.P, "B": cut.B, "L": cut.L, "kv_bytes": cut.kv_bytes, **sizes}
        return Volume(
            forward=cost.softmax_all_gather_forward(**shape), backward=cost.softmax_all_gather_backward(**shape)
        )
    if "transition" in sizes:
        shape = {"P": cut.P, "B": cut.B, "spans": cut.spans, **sizes}
        forward = cost.linear_all_gather_forward(**shape)
        del shape["transition"]  # it is not sent back
        return Volume(forward=forward, backward=cost.linear_all_gather_backward(**shape))
    return None


def cost_tables(points: Sequence[Point]) -> tuple[tuple[str, Table], ...]:
    """The report's two tables with the sentence above each: one layer by kind of exchange, and whole steps."""
    cut = setting(points[0].runs[0])
    if cut.P == 1:
        return ()
    return (_layer_table(points), _step_table(points))


def _layer_table(points: Sequence[Point]) -> tuple[str, Table]:
    cut = max((setting(point.runs[0]) for point in points), key=lambda one: one.spans)
    kinds = {name: sizes for point in points for name, sizes in _layers(point.runs[0]) if sizes}
    rows, notes = [], []
    for name, sizes in sorted(kinds.items(), key=lambda item: (item[0] == "softmax", item[0])):
        if name == "softmax":
            shape = {"P": cut.P, "B": cut.B, "kv_bytes": cut.kv_bytes, **sizes}
            methods = (
                ("AllGather-KV (used here)", cost.softmax_all_gather_forward, cost.softmax_all_gather_backward),
                ("ring attention", cost.ring_attention_forward, cost.ring_attention_backward),
            )
            for method, forward, backward in methods:
                at = [f(L=L, **shape) for L in (cut.L, LONG) for f in (forward, backward)]
                rows.append((name, method, *(f"{value:,}" for value in at)))
        else:
            state = {"P": cut.P, "B": cut.B, **{key: sizes[key] for key in "HKV"}}
            both = _volume(name, sizes, cut)
            assert both is not None
            rows.append(
                (name, "all-gather of states, LASP-2 (used here)", *2 * (f"{both.forward:,}", f"{both.backward:,}"))
            )
            rows.append((name, "ring of states, LASP-1", *4 * (f"{cost.lasp1_ring(**state):,}",)))
            if "softmax" in kinds:
                tokens = cost.break_even_tokens(
                    transition=sizes["transition"],
                    spans=cut.spans,
                    kv_bytes=cut.kv_bytes,
                    **{key: sizes[key] for key in "HKV"},
                    **kinds["softmax"],
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
        volumes = layer_volumes(run, cut)
        known = [volume for volume in volumes if volume is not None]
        exchanges = cut.passes * sum(volume.forward + volume.backward for volume in known)
        gradients = cost.gradient_all_reduce(P=cut.world, parameters=run.parameters)
        complete = len(known) == len(volumes)
        rows.append(
            (
                str(point.softmax),
                point.linear or "none (all softmax)",
                f"{exchanges:,}" if complete else "not modelled",
                f"{gradients:,}",
                f"{exchanges + gradients:,}" if complete else "not modelled",
                f"{counted:,.0f}",
                f"{counted - exchanges - gradients:+,.0f}" if complete else "",
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
