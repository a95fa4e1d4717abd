"""The contract in plain text: every public name of the engine with its signature, every recipe key with its default.

``python -m tests.test_public_names`` writes it again from the code.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hybrid_sp
from hybrid_sp.comm.link import Link
from layers.moe import MoEConfig
from layers.registry import MIXERS
from layers.rotary import RopeScaling
from recipes.config import Recipe

NAMES = """
SequenceParallel(
    group: Group,
    layout: str = 'contiguous',
    linear: str = 'all_gather',
    softmax: str = 'all_gather',
    kv_heads_per_gather: int | None = None,
    keep_kv: bool = True,
    overlap: bool | Collection[str] = True,
    check: str | bool = 'sequence',
    link: Link | None = None,
) -> None
SequenceParallel.overlaps(self, kind: str) -> bool
SequenceParallel.rank -> int
SequenceParallel.shard(self, length: int, cu_seqlens: Sequence[int] | None = None) -> Shard
SequenceParallel.size -> int
Shard(
    sp: SequenceParallel,
    length: int,
    cu_seqlens: tuple[int, ...] | None = None,
    calls: Iterator[int] = <factory>,
    agreement: Agreement | None = None,
    unit: int = 1,
) -> None
Shard.boundaries -> tuple[int, ...]
Shard.bounds -> tuple[int, ...]
Shard.broken -> tuple[int, ...]
Shard.document_end(self, token: int) -> int
Shard.document_start(self, token: int) -> int
Shard.gather(self, x_local: Tensor, dim: int = 1) -> Tensor
Shard.header(self, tag: str, direction: str, call: int, note: str = '') -> Header
Shard.join(self, x_P: Tensor, dim: int) -> Tensor
Shard.labels(self, tokens_BL: Tensor) -> Tensor
Shard.local_boundaries -> tuple[int, ...]
Shard.once(self, plan: Callable[Concatenate[Shard, P], R], *args: P.args, **kwargs: P.kwargs) -> R
Shard.own -> tuple[int, ...]
Shard.owners -> tuple[tuple[int, int], ...]
Shard.pad(self, x_local: Tensor, dim: int) -> Tensor
Shard.positions -> Tensor
Shard.require_agreement(self) -> None
Shard.require_batch(self, operator: str, x: Tensor) -> None
Shard.require_tokens(self, operator: str, **lengths: int) -> None
Shard.sequence -> str
Shard.span_count -> int
Shard.span_lengths -> tuple[int, ...]
Shard.spans -> list[tuple[int, int]]
Shard.spans_at(self, rank: int) -> list[tuple[int, int]]
Shard.split(self, x: Tensor, dim: int) -> Tensor
Shard.stretched(self, steps: int) -> Shard
Shard.take(self, x: Tensor, dim: int = 1) -> Tensor
Shard.tokens -> int
checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]
delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor | None = None,
    shard: Shard | None = None,
    scale: float | None = None,
    steps: int = 1,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = 'auto',
) -> Tensor | tuple[Tensor, Tensor]
init_mesh(
    dp: int = 1,
    sp: int = 1,
    device: str = 'cpu',
    timeout: timedelta = datetime.timedelta(seconds=600),
    *,
    eager: bool = False,
    gather_ctas: int | None = None,
) -> DeviceMesh
latent_attention(
    q: Tensor,
    latent: Tensor,
    rope_k: Tensor | None,
    w_k: Tensor,
    w_v: Tensor,
    *,
    shard: Shard | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: str = 'auto',
) -> Tensor
ledger() -> Iterator[Ledger]
linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    shard: Shard | None = None,
    scale: float | None = None,
    causal: bool = True,
    normalize: bool = False,
    initial_state: State | None = None,
    return_final_state: bool = False,
    backend: str = 'auto',
) -> Tensor | tuple[Tensor, State]
short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    shard: Shard | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]
softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: Tensor | None = None,
    shard: Shard | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    backend: str = 'auto',
) -> Tensor
sum_gradients(parameters: Iterable[Tensor], group: Group, tokens: int | Tensor) -> int | Tensor
token_shift(
    x: Tensor,
    *,
    shard: Shard | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]
"""

KEYS = """
name: str = 'run'
out: str = 'runs'
model.vocab: int = 256
model.dim: int = 128
model.depth: int = 8
model.heads: int = 4
model.kv_heads: int | None = None
model.linear: str = 'lightning'
model.ratio: str = '1/4'
model.pattern: Any = None
model.side_by_side: Literal['sum', 'mean'] = 'sum'
model.mlp_dim: int | None = None
model.mlp: Literal['swiglu', 'relu2'] = 'swiglu'
model.moe: MoEConfig | None = None
model.moe.experts: int = 8
model.moe.active: int = 2
model.moe.dim: int | None = None
model.moe.shared: int = 0
model.moe.shared_gate: bool = False
model.moe.router: Literal['softmax', 'sigmoid'] = 'softmax'
model.moe.normalize: bool = True
model.moe.scale: float = 1.0
model.moe.bias_rate: float = 0.0
model.moe.auxiliary: float = 0.0
model.tie_embeddings: bool = False
model.norm_eps: float = 1e-06
model.rope_base: float = 10000.0
model.rope_scaling: RopeScaling | None = None
model.rope_scaling.factor: float
model.rope_scaling.original_length: int
model.rope_scaling.beta_fast: float = 32.0
model.rope_scaling.beta_slow: float = 1.0
model.mixers: dict[str, dict[str, Any]] = {}
model.mixers.based.heads: int = 0
model.mixers.based.head_dim: int = 0
model.mixers.based.conv: int = 0
model.mixers.based.feature_dim: int = 16
model.mixers.comba.heads: int = 0
model.mixers.comba.head_dim: int = 0
model.mixers.comba.conv: int = 4
model.mixers.comba.expand_k: float = 0.75
model.mixers.comba.expand_v: float = 1.5
model.mixers.delta_net.heads: int = 0
model.mixers.delta_net.head_dim: int = 0
model.mixers.delta_net.conv: int = 4
model.mixers.delta_net.expand_k: float = 1.0
model.mixers.delta_net.expand_v: float = 1.0
model.mixers.delta_net.output_gate: bool = False
model.mixers.delta_net.negative_eigenvalues: bool = False
model.mixers.gated_delta_net.heads: int = 0
model.mixers.gated_delta_net.head_dim: int = 0
model.mixers.gated_delta_net.conv: int = 4
model.mixers.gated_delta_net.expand_k: float = 0.75
model.mixers.gated_delta_net.expand_v: float = 1.5
model.mixers.gated_delta_net.key_heads: int = 0
model.mixers.gated_delta_net.negative_eigenvalues: bool = False
model.mixers.gated_delta_product.heads: int = 0
model.mixers.gated_delta_product.head_dim: int = 0
model.mixers.gated_delta_product.conv: int = 4
model.mixers.gated_delta_product.steps: int = 2
model.mixers.gated_delta_product.expand_k: float = 0.75
model.mixers.gated_delta_product.expand_v: float = 1.5
model.mixers.gated_delta_product.key_heads: int = 0
model.mixers.gated_delta_product.negative_eigenvalues: bool = True
model.mixers.gla.heads: int = 0
model.mixers.gla.head_dim: int = 0
model.mixers.gla.conv: int = 0
model.mixers.gla.expand_k: float = 0.5
model.mixers.gla.expand_v: float = 1.0
model.mixers.gla.gate_rank: int = 16
model.mixers.gla.temperature: float = 16.0
model.mixers.hgrn2.heads: int = 0
model.mixers.hgrn2.head_dim: int = 0
model.mixers.hgrn2.conv: int = 0
model.mixers.hgrn2.lower_bound: str = 'learned'
model.mixers.kda.heads: int = 0
model.mixers.kda.head_dim: int = 0
model.mixers.kda.conv: int = 4
model.mixers.kda.expand_k: float = 1.0
model.mixers.kda.expand_v: float = 1.0
model.mixers.kda.key_heads: int = 0
model.mixers.kda.gate_rank: int = 0
model.mixers.kda.full_rank: str = 'none'
model.mixers.kda.gate_lower_bound: float = 0.0
model.mixers.kda.negative_eigenvalues: bool = False
model.mixers.lightning.heads: int = 0
model.mixers.lightning.head_dim: int = 0
model.mixers.lightning.conv: int = 0
model.mixers.linear.heads: int = 0
model.mixers.linear.head_dim: int = 0
model.mixers.linear.conv: int = 0
model.mixers.linear.feature_map: str = 'identity'
model.mixers.linear.normalize: bool = False
model.mixers.mamba2.heads: int = 0
model.mixers.mamba2.head_dim: int = 0
model.mixers.mamba2.conv: int = 4
model.mixers.mamba2.expand: float = 2.0
model.mixers.mamba2.state: int = 128
model.mixers.mamba2.groups: int = 1
model.mixers.mamba2.norm: bool = True
model.mixers.mla.head_dim: int = 0
model.mixers.mla.value_dim: int = 0
model.mixers.mla.rope_dim: int = 0
model.mixers.mla.rank: int = 0
model.mixers.mla.q_rank: int = 0
model.mixers.mla.rotate: bool = True
model.mixers.mla.gate: str = 'none'
model.mixers.rebased.heads: int = 0
model.mixers.rebased.head_dim: int = 0
model.mixers.rebased.conv: int = 0
model.mixers.rebased.feature_dim: int = 16
model.mixers.retention.heads: int = 0
model.mixers.retention.head_dim: int = 0
model.mixers.retention.conv: int = 0
model.mixers.retention.expand_v: float = 2.0
model.mixers.rwkv6.shift_rank: int = 32
model.mixers.rwkv6.decay_rank: int = 64
model.mixers.short_conv.conv: int = 3
model.mixers.sliding_window.head_dim: int = 0
model.mixers.sliding_window.conv: int = 0
model.mixers.sliding_window.qk_norm: bool = False
model.mixers.sliding_window.rope_fraction: float = 1.0
model.mixers.sliding_window.gate: str = 'none'
model.mixers.sliding_window.sinks: bool = False
model.mixers.sliding_window.window: int = 128
model.mixers.softmax.head_dim: int = 0
model.mixers.softmax.conv: int = 0
model.mixers.softmax.qk_norm: bool = False
model.mixers.softmax.rope_fraction: float = 1.0
model.mixers.softmax.gate: str = 'none'
model.mixers.softmax.sinks: bool = False
model.backend: str = 'auto'
data.files: str | None = None
data.validation: str | None = None
data.test: str | None = None
data.length: int = 512
data.pack: bool = False
train.steps: int = 1000
train.batch: int = 8
train.accumulation: int = 1
train.validate_every: int = 100
train.validation_sequences: int = 16
train.sample: int = 240
train.seed: int = 0
train.device: Literal['auto', 'cpu', 'cuda'] = 'auto'
train.dtype: Literal['float32', 'float64', 'bfloat16'] = 'float32'
train.threads: int | None = None
train.deterministic: bool = False
train.recompute: Literal['none', 'full', 'selective'] = 'none'
train.recompute_blocks: Any = None
train.trace: bool = False
train.keep_memory: bool = True
optim.lr: float = 0.001
optim.min_lr: float = 0.0
optim.warmup: int = 0
optim.schedule: Literal['cosine', 'constant'] = 'cosine'
optim.weight_decay: float = 0.1
optim.betas: tuple[float, float] = (0.9, 0.95)
optim.clip: float | None = 1.0
parallel.dp: int = 1
parallel.sp: int | None = None
parallel.layout: Literal['auto', 'contiguous', 'zigzag'] = 'auto'
parallel.linear: str = 'all_gather'
parallel.softmax: str = 'all_gather'
parallel.kv_heads_per_gather: int | None = None
parallel.keep_kv: bool = True
parallel.overlap: Any = True
parallel.link: Link | None = None
parallel.link.latency: float
parallel.link.bandwidth: float
parallel.check: Any = 'sequence'
parallel.timeout: float = 600.0
parallel.nccl_eager: bool = False
parallel.nccl_ctas: int | None = None
checkpoint.every: int = 100
checkpoint.keep: int = 2
checkpoint.resume: Literal['auto', 'never'] = 'auto'
wandb.mode: Literal['offline', 'online', 'disabled'] = 'offline'
wandb.project: str = 'hybrid_sp'
wandb.group: str | None = None
"""

OPTIONAL = {  # sections that are none by default
    "parallel.link": Link,
    "model.rope_scaling": RopeScaling,
    "model.moe": MoEConfig,
}


class _Text(str):
    """An annotation as it stands in the source."""

    def __repr__(self) -> str:
        return str(self)


def as_written(annotation: Any) -> Any:
    if annotation is inspect.Signature.empty:
        return annotation
    return _Text(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def signature(name: str, function: Any) -> str:
    """The name and signature as they stand in the source: on one line, or else a parameter on each."""
    found = inspect.signature(function)
    parameters, kinds = [], [value.kind for value in found.parameters.values()]
    for place, value in enumerate(found.parameters.values()):
        if value.kind is value.KEYWORD_ONLY and not {value.VAR_POSITIONAL, value.KEYWORD_ONLY} & set(kinds[:place]):
            parameters.append("*")
        parameters.append(str(value.replace(annotation=as_written(value.annotation))))
    text = f"{name}({', '.join(parameters)}) -> {as_written(found.return_annotation)}"
    return (
        text if len(text) <= 110 else text.replace(", ".join(parameters), "\n    " + ",\n    ".join(parameters) + ",\n")
    )


def names() -> Iterator[str]:
    """The names of `hybrid_sp.__all__`; of a class also its fields, properties and methods."""
    for name in sorted(hybrid_sp.__all__):
        thing = getattr(hybrid_sp, name)
        yield signature(name, thing)
        for member, value in sorted(vars(thing).items()) if inspect.isclass(thing) else ():
            if member.startswith("_"):
                continue
            getter = getattr(value, "fget", None) or getattr(value, "func", None)  # of a property, a cached one
            if getter is not None:
                yield signature(f"{name}.{member}", getter).replace("(self)", "")
            elif inspect.isfunction(value):
                yield signature(f"{name}.{member}", value)


def keys(section: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a section, of the sections in it, of optional ones, and of every mixer's options."""
    for field in dataclasses.fields(section):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(made):
            yield from keys(made, f"{key}.")
            continue
        yield f"{key}: {field.type}" + (f" = {made!r}" if made is not dataclasses.MISSING else "")
        if key == "model.mixers":
            for name, spec in sorted(MIXERS.items()):
                yield from keys(spec, f"{key}.{name}.")
        if key in OPTIONAL:
            yield from keys(OPTIONAL[key], f"{key}.")


def by_name(text: str) -> dict[str, str]:
    """The entries of a text, each of which begins at the margin with its name."""
    entries = re.split(r"\n(?=\w)", text.strip())
    return {re.match(r"[\w.]*", entry)[0]: entry for entry in entries}  # type: ignore[index]


def changes(expected: str, found: Iterator[str]) -> str:
    """The entries that differ, line by line: - as promised, + as in the code."""
    before, after = by_name(expected), by_name("\n".join(found))
    told = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, ""), after.get(name, "")
        if old != new:
            told += [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] != "?"]
    return "\n".join(told)


WHAT_TO_DO = (
    "Programs and recipes rest on this: - is promised in tests/test_public_names.py, + is what the code has. If it is "
    "meant, write it down by `python -m tests.test_public_names` and tell it in CHANGELOG.md. Else take it back."
)


def test_signatures_of_public_names() -> None:
    told = changes(NAMES, names())
    assert not told, f"{WHAT_TO_DO}\n\n{told}\n"


def test_recipe_keys() -> None:
    told = changes(KEYS, keys(Recipe))
    assert not told, f"{WHAT_TO_DO}\n\n{told}\n"


def test_a_change_is_told_with_its_name() -> None:
    def function(x: int, *, y: float = 0.5) -> int:
        """Has a signature."""
        return x

    here = signature("function", function)
    assert here == "function(x: int, *, y: float = 0.5) -> int"
    assert changes(f"{here}\n", iter([here])) == ""
    before = f"key: int = 1\n{here.replace('0.5', '0.25')}\ngone: int = 1"
    assert changes(before, iter(["key: int = 1", here])).splitlines() == [
        "- function(x: int, *, y: float = 0.25) -> int",
        "+ function(x: int, *, y: float = 0.5) -> int",
        "- gone: int = 1",
    ]


def write() -> None:
    """This file, with the contract that the code has now."""
    here = Path(__file__)
    source = here.read_text()
    for name, found in (("NAMES", names()), ("KEYS", keys(Recipe))):
        text = "".join(f"{line}\n" for line in found)
        assert '"""' not in text and "\\" not in text
        source = re.sub(rf'(?<=\n{name} = """\n).*?(?=""")', lambda _, text=text: text, source, count=1, flags=re.S)
    here.write_text(source)


if __name__ == "__main__":
    write()
