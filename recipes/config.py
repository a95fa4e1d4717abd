"""Define a run: frozen dataclasses hold every key and its only default; functions resolve the keys that mean "auto"."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import hybrid_sp as hsp
from hybrid_sp.comm.groups import Group
from hybrid_sp.comm.link import Link
from layers.config import ModelConfig, expand_pattern, pattern_letters

FORMAT = 1  # of recipe.yaml and of checkpoints; raise it for every change that older code would misread
UNNAMED = 1  # the format of run folders and checkpoints that name none
NAME_BYTES = 240  # file systems allow 255; the rest is for the suffix of a folder that is moved aside


class RecipeError(ValueError):
    """Report a recipe that cannot be run; the message names the key and what to change."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_format(found: Any, path: Path) -> None:
    """Raise RecipeError if the ``format`` of a file is not `FORMAT`. A run folder without one has `UNNAMED`."""
    if str(found) != str(FORMAT):
        raise RecipeError(
            f"{path} is of format {str(found)!r}, and this version reads format {FORMAT}; "
            "read it with the version of the code that wrote it"
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Name the text and the way it is cut into sequences."""

    files: str | None = None  # a file, a folder or a glob; null: the Python standard library's own source files
    validation: str | None = None  # the same; null: files whose names say validation, or a share of the bytes
    test: str | None = None  # the same; a run neither trains nor validates on this text
    length: int = 512  # tokens in one sequence, summed over all ranks
    pack: bool = False  # make every file a document: no state, key or label passes into the next one


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Set the length, the seed, the machine and the memory of a training."""

    steps: int = 1000
    batch: int = 8  # sequences in one optimiser step, summed over all dp ranks and all accumulation
    accumulation: int = 1  # forward-backward passes that make up one optimiser step
    validate_every: int = 100
    validation_sequences: int = 16
    sample: int = 240  # bytes that the trained model writes at the end; 0: none
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if this machine has a GPU for each process
    dtype: Literal["float32", "float64", "bfloat16"] = (
        "float32"  # of the weights; AdamW keeps float32 masters of bfloat16
    )
    threads: int | None = None  # CPU threads of one process; null: leave the choice to torch or torchrun
    deterministic: bool = False  # on a GPU, take kernels that give the same bits every time; slower
    recompute: Literal["none", "full", "selective"] = "none"  # these blocks keep only their input for backward
    recompute_blocks: Any = None  # for selective; null: every second block; or [0, 3]; or L; or N
    trace: bool = False  # write trace.json, for ui.perfetto.dev: one step of every layer on every rank
    keep_memory: bool = True  # on a CPU, reuse the memory of freed tensors: faster, up to 1.6 times the memory


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Set AdamW and its learning rate."""

    lr: float = 1e-3
    min_lr: float = 0.0  # the cosine ends here
    warmup: int = 0  # steps of linear warm-up
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0  # global gradient norm; null: no clipping


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Set the mesh of processes and how they communicate."""

    dp: int = 1
    sp: int | None = None  # null: the number of processes divided by dp
    layout: Literal["auto", "contiguous", "zigzag"] = "auto"  # auto: zigzag if any block is softmax or mla
    linear: str = "all_gather"  # exchange of states in linear blocks; auto: the fastest on the link
    softmax: str = "all_gather"  # exchange of keys and values in softmax blocks
    kv_heads_per_gather: int | None = None  # key heads that a softmax block gathers at a time; null: all
    keep_kv: bool = True  # keep gathered keys and values for backward; false: gather them again
    overlap: Any = True  # compute during communication; or only some kinds: [linear, softmax, conv]
    link: Link | None = None  # for linear=auto, {latency: seconds, bandwidth: bytes/s}; null: measure it
    check: Any = "sequence"  # compare the ranks' arguments per sequence; calls: before each collective; or false
    timeout: float = 600.0  # seconds that a rank waits for another one before it fails
    nccl_eager: bool = False  # connect all GPUs of a group at the start, instead of two at their first message
    nccl_ctas: int | None = None  # most thread blocks of a collective of NCCL over sp; null: NCCL chooses


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Set when checkpoints are saved, kept and resumed."""

    every: int = 100  # steps between saves; the last step is always saved
    keep: int = 2  # newest checkpoints to keep
    resume: Literal["auto", "never"] = "auto"  # never: move an earlier run of the same folder aside


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Set how wandb records the curves."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "hybrid_sp"
    group: str | None = None  # null: the first part of the run's name, such as that of the sweep


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hold everything that a run needs to know."""

    name: str = "run"  # folder under `out`; by default the file's name and the command line's changes
    out: str = "runs"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


# Keys of where the text lies. A resumed run compares the text itself, by its fingerprint.
TEXT_KEYS = ("data.files", "data.validation", "data.test")
# Keys that do not change the trained weights beyond rounding, so a resumed run may change them.
FREE_KEYS = (
    *TEXT_KEYS, "name", "out", "parallel.", "checkpoint.", "wandb.", "train.device", "train.threads",
    "train.validate_every", "train.validation_sequences", "train.sample", "train.keep_memory", "train.recompute",
    "train.trace", "train.deterministic", "model.backend",
)  # fmt: skip
# Free keys that experiments compare, so the default name of a run includes them.
STRATEGY_KEYS = (
    "parallel.linear", "parallel.softmax", "parallel.kv_heads_per_gather", "parallel.keep_kv", "parallel.overlap",
    "model.backend",
)  # fmt: skip


def run_folder(recipe: Recipe) -> Path:
    """Return the folder of a run: ``out/name``."""
    return Path(recipe.out) / recipe.name


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return every value of a recipe by its dotted key."""
    return dict(leaves(asdict(recipe)))


def difference(old: Recipe, new: Recipe) -> list[str]:
    """List the keys that make two recipes compute different weights, as ``key (old -> new)``."""
    before, after = flat(old), flat(new)
    keys = [key for key in {**before, **after} if not key.startswith(FREE_KEYS)]
    return [f"{key} ({before.get(key)} -> {after.get(key)})" for key in keys if before.get(key) != after.get(key)]


def leaves(sections: Any) -> list[tuple[str, Any]]:
    """List the dotted keys, such as train.steps, with their values; the options of all mixers stay one value."""
    return [
        (section if key is None else f"{section}.{key}", value)
        for section, values in sections.items()
        for key, value in (values.items() if isinstance(values, dict) and values else [(None, values)])
    ]


def layout(recipe: Recipe) -> str:
    """Resolve ``parallel.layout``."""
    if recipe.parallel.layout != "auto":
        return recipe.parallel.layout
    return "zigzag" if "N" in pattern_letters(expand_pattern(recipe.model)) else "contiguous"


def sequence_parallel(recipe: Recipe, group: Group) -> hsp.SequenceParallel:
    """Build the engine's settings for sequences that are cut over ``group``, the axis sp of the mesh."""
    parallel = recipe.parallel
    return hsp.SequenceParallel(
        group,
        layout=layout(recipe),
        linear=parallel.linear,
        softmax=parallel.softmax,
        kv_heads_per_gather=parallel.kv_heads_per_gather,
        keep_kv=parallel.keep_kv,
        overlap=parallel.overlap if isinstance(parallel.overlap, bool) else tuple(parallel.overlap),
        check=parallel.check,
        link=parallel.link,
    )


def recomputed_blocks(model: ModelConfig, train: TrainConfig) -> tuple[int, ...]:
    """Resolve ``train.recompute`` and ``train.recompute_blocks`` to numbers of blocks."""
    depth, chosen = model.depth, train.recompute_blocks
    if train.recompute == "selective" and chosen is not None:
        letters = pattern_letters(expand_pattern(model))
        return tuple(i for i in range(depth) if (letters[i] == chosen if isinstance(chosen, str) else i in chosen))
    return {"none": (), "full": tuple(range(depth)), "selective": tuple(range(1, depth, 2))}[train.recompute]
