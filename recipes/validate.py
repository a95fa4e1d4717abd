"""Check that a recipe can be run. No check needs a process group; each error says in one line what to change."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from hybrid_sp.backends import BACKENDS
from hybrid_sp.baselines.head_parallel import HEAD_PARALLEL
from hybrid_sp.shard import CHECKS, KINDS
from layers.config import mixer_specs, model_facts
from layers.registry import mixer_cost
from recipes.config import NAME_BYTES, Recipe, RecipeError, layout, sequence_parallel

BYTES = 256  # the words of the data
SEEDS = 10**13  # the largest seed: every rank derives its own from it, within torch's 64 bits


def processes(variable: str = "WORLD_SIZE") -> int:
    """Return the number of processes that torchrun reports, in all or on this machine; 1 without torchrun."""
    text = os.environ.get(variable, "1")
    _require(
        re.fullmatch(r"[1-9]\d{0,8}", text) is not None,
        f"the environment has {variable}={text!r}, which",
        "must be a number of processes; torchrun sets it, else unset it",
    )
    return int(text)


def mesh_shape(recipe: Recipe, world: int) -> tuple[int, int]:
    """Return the sizes (dp, sp) of the mesh over ``world`` processes; raise RecipeError if they do not fit."""
    dp, sp = recipe.parallel.dp, recipe.parallel.sp
    _require(dp >= 1 and (sp is None or sp >= 1), f"parallel.dp={dp}, parallel.sp={sp}", "each must be at least 1")
    if sp is None:
        _require(
            world % dp == 0,
            f"parallel.dp={dp}",
            f"does not divide the {world} processes; set parallel.dp to a divisor or start another number of processes",
        )
        sp = world // dp
    _require(
        dp * sp == world,
        f"parallel.dp={dp}, parallel.sp={sp}",
        f"make {dp * sp} processes, but {world} were started; "
        f"use torchrun --nproc-per-node {dp * sp} (make: NPROC={dp * sp}), or set parallel.sp=null",
    )
    return dp, sp


def validate(recipe: Recipe, world: int) -> None:
    """Raise RecipeError for a recipe that cannot be trained; this needs no process group.

    ``world`` is the number of processes. The message names the key, the value and what to change.
    """
    if said := untrainable(recipe):
        raise RecipeError(said)
    validate_shape(recipe, world)


def untrainable(recipe: Recipe) -> str:
    """Say why a sound model cannot be trained by this program on any machine; empty if it can."""
    vocab = recipe.model.vocab
    return f"model.vocab={vocab} must be 256: the data are bytes" if vocab != BYTES else ""


def validate_shape(recipe: Recipe, world: int) -> None:
    """Raise RecipeError for values that cannot work together, as `validate` does, but let any vocabulary pass."""
    _require(
        re.fullmatch(r"[\w.=-]+(/[\w.=-]+)*", recipe.name) is not None and ".." not in recipe.name,
        f"name={recipe.name!r}",
        "must be a relative path of letters, digits and . _ - =, for it becomes the run's folder under `out`",
    )
    for key, path in (("name", recipe.name), ("out", recipe.out)):
        _require(
            all(len(part.encode()) <= NAME_BYTES for part in path.split("/")),
            f"{key}={path[:20]}...",
            f"has a part of {max(len(part.encode()) for part in path.split('/'))} bytes; a folder's name may have "
            f"{NAME_BYTES}",
        )
    _require(
        0 < len(recipe.wandb.project) <= 128 and not set(recipe.wandb.project) & set("/\\#?%:"),
        f"wandb.project={recipe.wandb.project!r}",
        "must have 1 to 128 letters, none of / \\ # ? % : among them, for wandb takes no other",
    )
    _validate_numbers(recipe)
    _validate_choices(recipe)
    _validate_model(recipe)
    dp, sp = mesh_shape(recipe, world)
    _validate_strategies(recipe, sp)
    train, length = recipe.train, recipe.data.length
    spans = sp * (2 if layout(recipe) == "zigzag" else 1)
    _require(
        length >= max(spans, 2),
        f"data.length={length}",
        f"is shorter than the {spans} spans of {sp} ranks ({layout(recipe)}); raise it, or lower parallel.sp",
    )
    parts = dp * train.accumulation
    _require(
        train.batch % parts == 0,
        f"train.batch={train.batch}",
        f"is not a multiple of parallel.dp * train.accumulation = {dp} * {train.accumulation} = {parts}; "
        f"the nearest are {train.batch // parts * parts or parts} and {(train.batch // parts + 1) * parts}",
    )
    _require(
        train.validation_sequences % dp == 0,
        f"train.validation_sequences={train.validation_sequences}",
        f"is not a multiple of parallel.dp={dp}",
    )


def _validate_numbers(recipe: Recipe) -> None:
    train, optim, heads = recipe.train, recipe.optim, recipe.parallel.kv_heads_per_gather
    positive = {
        "train.steps": train.steps, "train.batch": train.batch, "train.accumulation": train.accumulation,
        "train.validate_every": train.validate_every, "train.validation_sequences": train.validation_sequences,
        "train.threads": 1 if train.threads is None else train.threads, "checkpoint.every": recipe.checkpoint.every,
        "checkpoint.keep": recipe.checkpoint.keep, "optim.lr": optim.lr, "parallel.timeout": recipe.parallel.timeout,
        "optim.clip": 1.0 if optim.clip is None else optim.clip,
        "parallel.kv_heads_per_gather": 1 if heads is None else heads,
        "parallel.nccl_ctas": 1 if recipe.parallel.nccl_ctas is None else recipe.parallel.nccl_ctas,
    }  # fmt: skip
    if (link := recipe.parallel.link) is not None:
        positive["parallel.link.bandwidth"] = link.bandwidth
        _require(
            0 <= link.latency < float("inf"), f"parallel.link.latency={link.latency}", "must be seconds, at least 0"
        )
    for key, value in positive.items():
        _require(0 < value < float("inf"), f"{key}={value}", "must be a finite number above 0")
    _require(0 <= train.seed <= SEEDS, f"train.seed={train.seed}", f"must lie between 0 and {SEEDS:,}")
    rest = {"optim.weight_decay": optim.weight_decay, "optim.warmup": optim.warmup, "train.sample": train.sample}
    for key, value in rest.items():
        _require(0 <= value < float("inf"), f"{key}={value}", "must be a finite number, at least 0")
    _require(
        0 <= optim.min_lr <= optim.lr, f"optim.min_lr={optim.min_lr}", f"must lie between 0 and optim.lr={optim.lr}"
    )
    _require(all(0 <= beta < 1 for beta in optim.betas), f"optim.betas={optim.betas}", "must lie in [0, 1)")


def _validate_choices(recipe: Recipe) -> None:
    """Check the keys that take values of more than one type."""
    overlap, blocks, depth = recipe.parallel.overlap, recipe.train.recompute_blocks, recipe.model.depth
    _require(
        recipe.parallel.check in CHECKS,
        f"parallel.check={recipe.parallel.check}",
        "must be sequence (compare what ranks were given, once per sequence), calls (also before each collective) or "
        "false",
    )
    _require(
        isinstance(overlap, bool) or (isinstance(overlap, list | tuple) and set(overlap) <= set(KINDS)),
        f"parallel.overlap={overlap}",
        f"must be true, false or a list of kinds of layer such as [linear, softmax]; kinds: {', '.join(KINDS)}",
    )
    _require(
        blocks is None or recipe.train.recompute == "selective",
        f"train.recompute_blocks={blocks}",
        f"needs train.recompute=selective, not {recipe.train.recompute}",
    )
    numbers = isinstance(blocks, Sequence) and all(type(i) is int and 0 <= i < depth for i in blocks)
    _require(
        blocks is None or blocks in ("L", "N") or (numbers and not isinstance(blocks, str)),
        f"train.recompute_blocks={blocks}",
        f"must be L, N or a list of block numbers from 0 to {depth - 1}, or null for every second block",
    )


def _validate_strategies(recipe: Recipe, sp: int) -> None:
    """Check that every strategy fits the blocks: their (key) heads can be cut, and their decays are supported."""
    linear, softmax = recipe.parallel.linear, recipe.parallel.softmax
    for name, spec, context in mixer_specs(recipe.model):
        facts = mixer_cost(spec, context)
        # Count the heads of keys: no kind has fewer, and they divide the heads of values and queries.
        for kind, strategy, heads in (
            ("linear", linear, [summary.groups or summary.heads for summary in facts.summaries]),
            ("softmax", softmax, [attention.kv_heads for attention in facts.attention]),
        ):
            for count in heads if strategy in HEAD_PARALLEL else ():
                _require(
                    count % sp == 0,
                    f"parallel.{kind}={strategy}",
                    f"cuts the {count} (key) heads of {name} into {sp} parts; set parallel.sp to a divisor of {count}, "
                    f"change the heads of the model, or set parallel.{kind}=all_gather",
                )
        for summary in facts.summaries if linear == "ring_attention" else ():
            _require(
                summary.transition in ("none", "fixed", "scalar"),
                "parallel.linear=ring_attention",
                f"takes no {name}: it multiplies q and k, and so takes one decay per head at most, and no delta rule; "
                "set parallel.linear=all_gather or another mixer",
            )


def _validate_model(recipe: Recipe) -> None:
    model = recipe.model
    try:
        model_facts(model)
    except ValueError as error:
        raise RecipeError(f"model: {error}") from error
    facts = [mixer_cost(spec, context) for _, spec, context in mixer_specs(model)]
    transitions = [summary.transition for fact in facts for summary in fact.summaries]
    linear = ["delta_rule" if transition == "matrix" else "linear_attention" for transition in transitions]
    operators = sorted({*linear, *("softmax_attention" for fact in facts if fact.attention)})
    _require(
        model.backend in ("auto", *(name for operator in operators for name in BACKENDS[operator])),
        f"model.backend={model.backend}",
        f"is none of a block of this model, whose operators are {', '.join(operators)}; set model.backend=auto",
    )
    try:
        sequence_parallel(recipe, None)
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(f"parallel: {error}") from error


def _require(condition: bool, setting: str, reason: str) -> None:
    if not condition:
        raise RecipeError(f"{setting} {reason}")
