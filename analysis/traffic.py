"""The traffic of a sweep's models: bytes by the cost model, next to the bytes that the ledger counted in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypeVar

from omegaconf import OmegaConf

from analysis.points import Point
from analysis.runs import Run
from analysis.tables import Table
from hybrid_sp.baselines import BASELINES
from hybrid_sp.comm.link import Link
from hybrid_sp.exchange import EXCHANGES, Sizes, choose_by, kv
from hybrid_sp.exchange.strategy import GRADIENT, TokenSizes, TokenStrategy
from hybrid_sp.shard import LAYOUTS
from layers.config import ModelConfig, mixer_specs
from layers.cost import (
    Attention,
    Cost,
    Summary,
    gradient_all_reduce,
    halo_backward,
    halo_forward,
    transition_elements,
)
from layers.registry import mixer_cost
from recipes.config import TrainConfig, recomputed_blocks

C = TypeVar("C", ModelConfig, TrainConfig)
LONG = 65_536  # a second length, for comparison
SOFTMAX: dict[str, TokenStrategy] = {"all_gather": kv.STRATEGY, **BASELINES["softmax"]}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The cut of one run: P ranks in its sp group, `spans` on each, B sequences in one pass, L tokens in a sequence.

    linear   the exchange of states, "auto", or a baseline
    link     the network by which "auto" chose
    softmax  the exchange of keys and values, or a baseline
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
    wide: int = 1  # 2 in fp64, where every message is twice its size in fp32
    recomputed: frozenset[int] = frozenset()  # blocks whose forward runs again in backward

    @property
    def layout(self) -> str:
        return LAYOUTS[self.spans - 1]


@dataclass(frozen=True, kw_only=True)
class Volume:
    """The bytes that one rank receives for one layer, in the forward and in the backward pass."""

    forward: int
    backward: int


def setting(run: Run) -> Setting:
    """Read the cut of a run's sequences from its resolved recipe and its provenance."""
    recipe, dp, P = run.recipe, int(run.provenance["dp"]), int(run.provenance["sp"])
    layout, passes = recipe["parallel"]["layout"], int(recipe["train"]["accumulation"])
    zigzag = layout == "zigzag" or (layout == "auto" and "N" in run.pattern)
    B, L = int(recipe["train"]["batch"]) // dp // passes, int(recipe["data"]["length"])
    if recipe["data"].get("pack"):  # one row of documents: the model is then an upper bound for softmax layers
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


def exchanged(run: Run) -> int:
    """Predict the bytes that rank 0 receives in one step in the exchanges of all blocks."""
    cut = setting(run)
    if cut.P == 1:  # and "auto" has no link to choose by
        return 0
    volumes = [volume(facts, cut, again=number in cut.recomputed) for number, _, facts in _layers(run)]
    return cut.passes * sum(one.forward + one.backward for one in volumes)


def _layers(run: Run) -> list[tuple[int, str, Cost]]:
    """Return the block, the name and the cost facts of every mixer."""
    return [(context.layer, name, mixer_cost(spec, context)) for name, spec, context in mixer_specs(model_config(run))]


def model_config(run: Run) -> ModelConfig:
    """Return the shape of the run's model."""
    return _config(ModelConfig, run.recipe["model"])


def _config(kind: type[C], values: Any) -> C:
    """Read a part of a recipe, with defaults for the options that an older run did not have."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    assert isinstance(config, kind)
    return config


def volume(facts: Cost, cut: Setting, rank: int = 0, again: bool = False) -> Volume:
    """Compute the bytes that a rank receives for one layer with these cost facts.

    `again` means that backward runs the layer's forward again. Only the baselines then communicate a second time; they
    are other forms of the operator.
    """
    forward = backward = repeated = 0
    for one in facts.summaries:
        there, back = _linear(one, cut, rank)
        forward, backward = forward + there, backward + back
        repeated += there * (cut.linear in BASELINES["linear"])
    halos = [(one.tokens, one.channels, False) for one in facts.halos]
    for keys in facts.attention:
        if keys.window is not None and _as_halo(keys, cut):
            halos.append((keys.window - 1, keys.row, not cut.keep_kv))
            continue
        there, back = _softmax(keys, cut)
        forward, backward = forward + there, backward + back
        repeated += there * (cut.softmax != "all_gather")
    for tokens, channels, twice in halos:
        halo: Any = {"P": cut.P, "B": cut.B, "spans": cut.spans, "rank": rank, "tokens": tokens, "channels": channels}
        there = halo_forward(**halo, element_bytes=cut.kv_bytes)
        forward, backward = forward + there, backward + halo_backward(**halo) + there * twice
    return Volume(forward=cut.wide * (forward + again * repeated), backward=cut.wide * backward)


def _linear(summary: Summary, cut: Setting, rank: int) -> tuple[int, int]:
    chosen = exchange(summary, cut)
    if chosen not in BASELINES["linear"]:
        return EXCHANGES[chosen].received(_sizes(summary, cut), rank)
    groups, heads = summary.groups or summary.heads, summary.heads
    keys, values = groups * summary.key, heads * summary.value
    numbers = (keys, keys, values, values)
    gates, decays = heads * summary.gates, heads * transition_elements(summary.transition, summary.key)
    sizes = TokenSizes(
        cut.P, cut.layout, cut.B, summary.steps * cut.L, *numbers, cut.kv_bytes, gates, decays, heads, groups
    )
    return BASELINES["linear"][chosen].received(sizes)


def _sizes(summary: Summary, cut: Setting, wide: int = 1) -> Sizes:
    """Return the sizes of a layer's states; `wide` as in `Setting`."""
    state, transition = (cut.B * summary.heads * GRADIENT * wide * numbers for numbers in summary.numbers)
    return Sizes(cut.P, cut.layout, state, transition)


def _softmax(keys: Attention, cut: Setting) -> tuple[int, int]:
    """Compute the bytes of a softmax layer, unless its window travels as a halo."""
    queries, outputs = keys.heads * keys.width, keys.heads * keys.values
    numbers = (queries, keys.kv_heads * keys.width, keys.kv_heads * keys.values, outputs)
    if keys.latent and cut.softmax == "all_gather":
        numbers = (queries, keys.latent, 0, outputs)
    sizes = TokenSizes(
        cut.P, cut.layout, cut.B, cut.L, *numbers, cut.kv_bytes,
        keep_kv=cut.keep_kv, heads=keys.heads, groups=keys.kv_heads,
    )  # fmt: skip
    return SOFTMAX[cut.softmax].received(sizes)


def exchange(summary: Summary, cut: Setting) -> str:
    """Name the exchange of a linear layer with these summaries; "auto" chooses by the link, as it did in the run."""
    if cut.linear != "auto":
        return cut.linear
    if cut.link is None:
        raise ValueError('the link by which linear="auto" has chosen is neither in the recipe nor in the provenance')
    return choose_by(cut.link, _sizes(summary, cut, cut.wide)).strategy


def _as_halo(keys: Attention, cut: Setting) -> bool:
    """Return True if only the tokens of a window travel."""
    return keys.window is not None and cut.softmax == "all_gather"


def break_even_tokens(
    *, H: int, K: int, V: int, G: int, D: int, transition: str = "none", spans: int = 1, kv_bytes: int = 2
) -> float:
    """Compute the tokens per rank T above which a linear layer's forward gather is smaller than a softmax layer's.

    n * H * (K V + a) * 4 = 2 * T * G * D * kv_bytes, solved for T, for n spans on a rank and a transition of a numbers.
    Neither the ranks nor the batch matter.
    """
    state = spans * H * (K * V + transition_elements(transition, K)) * GRADIENT
    return state / (2 * G * D * kv_bytes)


def cost_tables(points: Sequence[Point]) -> tuple[tuple[str, Table], ...]:
    """Return the report's two tables, one layer by kind of exchange and whole steps, with a sentence above each."""
    if setting(points[0].runs[0]).P == 1:
        return ()
    return (_layer_table(points), _step_table(points))


def _layer_table(points: Sequence[Point]) -> tuple[str, Table]:
    cuts = [setting(point.runs[0]) for point in points]
    cut = max(cuts, key=lambda one: one.spans)
    strategies = [one for one in cuts if one.spans == cut.spans]
    kinds = {name: facts for point in points for _, name, facts in _layers(point.runs[0])}
    full = next((one for facts in kinds.values() for one in facts.attention if one.window is None), None)
    rows, notes = [], []

    def row(name: str, exchange: str, at: Sequence[int]) -> None:
        rows.append((name, exchange, *(f"{value:,}" for value in at)))

    def volumes(facts: Cost, cut: Setting) -> list[int]:
        """Compute forward and backward bytes at both lengths, on the rank that receives the most."""
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
                row(name, SOFTMAX["ring"].label, volumes(Cost(attention=(one,)), replace(cut, softmax="ring")))
        chosen = {exchange(one, each) for one in facts.summaries for each in strategies}
        for other in [other for other in EXCHANGES if facts.summaries and other not in chosen]:
            row(name, EXCHANGES[other].label, volumes(Cost(summaries=facts.summaries), replace(cut, linear=other)))
        for summary in facts.summaries:
            if full is not None:
                tokens = break_even_tokens(
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
    """Name the exchanges of a layer, for the table."""
    chosen = [exchange(one, cut) for one in facts.summaries]
    again = "" if cut.keep_kv or cut.softmax != "all_gather" else ", again in backward"
    return " and ".join(
        [
            *[(EXCHANGES | BASELINES["linear"])[one].label for one in chosen],
            *[f"{SOFTMAX[cut.softmax].label}{again}" for one in facts.attention if not _as_halo(one, cut)],
            *["halo" for _ in facts.halos],
            *[f"halo{again}" for one in facts.attention if _as_halo(one, cut)],
        ]
    )


def _step_table(points: Sequence[Point]) -> tuple[str, Table]:
    rows = []
    for point in points:
        run = point.runs[0]
        cut, counted, exchanges = setting(run), median(row.received_bytes for row in run.train), exchanged(run)
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
