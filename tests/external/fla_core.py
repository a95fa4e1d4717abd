"""Our operators on one device (float64) against the naive functions of fla-core, which compute in float32.

Outputs, final states and the gradients of every input, of a batch and of packed documents: theirs read one document
after another, ours all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fla.ops.attn.naive import naive_parallel_attn
from fla.ops.based.naive import naive_parallel_based
from fla.ops.comba.naive import naive_chunk_comba
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.rebased.naive import naive_parallel_rebased
from fla.ops.retention.naive import naive_retention
from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
from fla.ops.simple_gla.naive import naive_chunk_simple_gla, naive_recurrent_simple_gla
from torch import Tensor

import hybrid_sp as hsp
from layers.mixers.based import squares, taylor_features
from layers.mixers.comba import with_feedback
from layers.mixers.gated_delta_product import DeltaProductRule
from layers.recurrence import MixerShape, RecurrenceInputs
from tests.external.program import Errors, report
from tests.support.oracle import relative

TOKENS, G, H, K, V = 139, 2, 4, 6, 10  # more tokens than two chunks
STEPS = 3  # writes per token
DOCUMENTS = (0, 1, 24, 120, TOKENS)
BY_TOKEN = {"q", "k", "v", "log_decay", "beta"}  # tokens are dim 1; other inputs belong to a whole sequence

Tensors = dict[str, Tensor]
Outputs = Sequence[Tensor]  # o, and the final state if there is one


class Comparison(NamedTuple):
    """`theirs(**inputs)` and `ours(**inputs, shard=...)`. Inputs S, and z with it, are the initial state; a document
    after the first is read without them."""

    inputs: Tensors
    theirs: Callable[..., Outputs]
    ours: Callable[..., Outputs]


def comparisons(batch: int) -> dict[str, Comparison]:
    torch.manual_seed(0)
    by_token = (batch, TOKENS)
    q, k, v = torch.randn(*by_token, G, K), torch.randn(*by_token, G, K), torch.randn(*by_token, H, V)
    S, z = torch.randn(batch, H, K, V), torch.rand(batch, H, K)
    scalar, vector = F.logsigmoid(torch.randn(*by_token, H)), F.logsigmoid(torch.randn(*by_token, H, K))
    beta, u = torch.sigmoid(torch.randn(*by_token, H)), torch.randn(H, K)
    unit = F.normalize(k, dim=-1)
    qkv = {"q": q, "k": k, "v": v}
    return {
        "linear": Comparison(qkv | {"S": S}, linear, recurrence(hsp.linear_attention)),
        "linear normalized": Comparison(
            {"q": q.abs(), "k": k.abs(), "v": v, "S": S, "z": z},
            normalized,
            lambda S=None, z=None, **x: flat(
                hsp.linear_attention(
                    **x,
                    normalize=True,
                    initial_state=None if S is None else (S, z),
                    return_final_state=True,
                )
            ),
        ),
        "lightning": Comparison(
            qkv | {"slope": -torch.linspace(0, 1, H), "S": S},
            lambda slope, S=None, **x: simple_gla(**x, log_decay=slope.expand(*x["v"].shape[:3]), S=S),
            lambda slope, **x: recurrence(hsp.linear_attention)(**x, log_decay=slope),
        ),
        "retention": Comparison(qkv, retention, lambda **x: [hsp.linear_attention(**x, log_decay=retention_decay())]),
        "simple_gla": Comparison(qkv | {"log_decay": scalar, "S": S}, simple_gla, recurrence(hsp.linear_attention)),
        "simple_gla in chunks": Comparison(
            qkv | {"log_decay": scalar, "S": S}, simple_gla_in_chunks, recurrence(hsp.linear_attention, scale=0.7)
        ),
        "gla": Comparison(qkv | {"log_decay": vector, "S": S}, gla, recurrence(hsp.linear_attention)),
        "hgrn": Comparison({"v": v, "log_decay": F.logsigmoid(v.roll(1, 1)), "S": S[:, :, 0]}, hgrn, ours_hgrn),
        "rwkv6": Comparison(
            qkv | {"log_decay": vector, "bonus": u, "S": S}, rwkv6, recurrence(hsp.linear_attention, scale=1.0)
        ),
        "based": Comparison(
            qkv,
            lambda q, k, v: parallel(naive_parallel_based, q, k, v),
            lambda q, k, v, shard: [
                hsp.linear_attention(taylor_features(q), taylor_features(k), v, scale=1.0, normalize=True, shard=shard)
            ],
        ),
        "rebased": Comparison(
            {"q": q.abs(), "k": k.abs(), "v": v},  # away from weights of 0, where they add another epsilon
            lambda q, k, v: parallel(naive_parallel_rebased, q, k, v),
            lambda q, k, v, shard: [
                hsp.linear_attention(squares(q), squares(k), v, scale=1 / K, normalize=True, shard=shard)
            ],
        ),
        "delta_rule": Comparison(
            {"q": q, "k": unit, "v": v, "beta": beta, "S": S}, delta_rule, recurrence(hsp.delta_rule)
        ),
        "gated_delta_rule": Comparison(
            {"q": q, "k": unit, "v": v, "beta": beta, "log_decay": scalar, "S": S},
            gated_delta_rule,
            recurrence(hsp.delta_rule, scale=0.7),
        ),
        "gated_delta_product": Comparison(
            {"q": q, "k": written(unit), "v": written(v), "beta": written(beta), "log_decay": scalar, "S": S},
            gated_delta_product,
            ours_gated_delta_product,
        ),
        "comba": Comparison(
            {"q": q, "k": unit, "v": v, "beta": beta, "log_decay": scalar, "feedback": torch.rand(H)}, comba, ours_comba
        ),
        "kda": Comparison(
            {"q": q, "k": unit, "v": v, "beta": beta, "log_decay": vector, "S": S}, kda, recurrence(hsp.delta_rule)
        ),
        "attention": Comparison(
            {"q": v, "k": v[:, :, :G].roll(1, 1), "v": v[:, :, G:]},
            lambda q, k, v: naive_parallel_attn(q, k, v)[:1],
            lambda **x: [hsp.softmax_attention(**x)],
        ),
        "attention in a window": Comparison(
            {"q": v, "k": v[:, :, :G].roll(1, 1), "v": v[:, :, G:]},
            lambda q, k, v: naive_parallel_attn(q, k, v, window_size=17)[:1],
            lambda **x: [hsp.softmax_attention(**x, window=17)],
        ),
    }


# Theirs.


def linear(q: Tensor, k: Tensor, v: Tensor, S: Tensor | None = None) -> Outputs:
    return naive_recurrent_linear_attn(*repeated(q, k), v, initial_state=S, output_final_state=True)


def normalized(q: Tensor, k: Tensor, v: Tensor, S: Tensor | None = None, z: Tensor | None = None) -> Outputs:
    state = None if S is None else (S, z[:, None])
    o, (S, z) = naive_recurrent_linear_attn(
        *repeated(q, k), v, initial_state=state, output_final_state=True, normalize=True
    )
    return o, S, z[:, 0]


def retention(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return [by_head(naive_retention(*(by_head(x) for x in (*repeated(q, k), v))))]


def simple_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, S: Tensor | None = None) -> Outputs:
    return naive_recurrent_simple_gla(*repeated(q, k), v, log_decay, initial_state=S)


def simple_gla_in_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, S: Tensor | None = None) -> Outputs:
    options = {"scale": 0.7, "chunk_size": 16, "output_final_state": True}
    return naive_chunk_simple_gla(*repeated(q, k), v, log_decay, initial_state=S, **options)


def gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, S: Tensor | None = None) -> Outputs:
    return naive_recurrent_gla(*repeated(q, k), v, log_decay, initial_state=S, output_final_state=True)


def hgrn(v: Tensor, log_decay: Tensor, S: Tensor | None = None) -> Outputs:
    """Of H * V channels, each with a state of one number."""
    o, S = naive_recurrent_hgrn(
        v.flatten(2), log_decay.flatten(2), None if S is None else S.flatten(1), output_final_state=True
    )
    return o.view_as(v), S.unflatten(1, (H, V))


def rwkv6(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, S: Tensor | None = None) -> Outputs:
    tensors = [by_head(x) for x in (*repeated(q, k), v, log_decay)]
    o, S = naive_recurrent_rwkv6(*tensors, bonus, scale=1.0, initial_state=S, output_final_state=True)
    return by_head(o), S


def parallel(naive: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return [by_head(naive(*(by_head(x) for x in (*repeated(q, k), v))))]


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor | None = None) -> Outputs:
    o, S = delta_rule_recurrence(*(by_head(x) for x in (*repeated(q, k), v, beta)), initial_state=S)
    return by_head(o), S


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, S: Tensor | None = None
) -> Outputs:
    return naive_recurrent_gated_delta_rule(
        *repeated(q, k), v, beta, log_decay, scale=0.7, initial_state=S, output_final_state=True
    )


def gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, S: Tensor | None = None
) -> Outputs:
    steps = [x.flatten(1, 2) for x in (k, v, beta)]
    q, k = repeated(q, steps[0])
    return naive_recurrent_gated_delta_product(
        q, k, steps[1], log_decay, steps[2], K**-0.5, None, S, output_final_state=True, num_householder=STEPS
    )


def comba(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, feedback: Tensor) -> Outputs:
    """In chunks: their token loop reads the state after its decay, unlike this and their kernels."""
    q, k = repeated(q, k)
    return naive_chunk_comba(q, k, v, feedback[:, None] * k, log_decay, beta)[:1]


def kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, S: Tensor | None = None) -> Outputs:
    return naive_recurrent_kda(q, k, v, log_decay, beta, initial_state=S, output_final_state=True)


def written(x: Tensor) -> Tensor:
    """STEPS different writes per token, [B,T,STEPS,...]."""
    return torch.stack([x.roll(step, 1) for step in range(STEPS)], 2)


def repeated(*tensors_BTGK: Tensor) -> list[Tensor]:
    """For functions that know no shared keys: value head h reads key head h // (H // G)."""
    return [x.repeat_interleave(H // G, dim=2) for x in tensors_BTGK]


def by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


# Ours.


def recurrence(operator: Callable[..., Any], **options: Any) -> Callable[..., Outputs]:
    return lambda S=None, **x: operator(**x, **options, initial_state=S, return_final_state=True)


def flat(outputs: tuple[Tensor, tuple[Tensor, Tensor]]) -> Outputs:
    return outputs[0], *outputs[1]


def retention_decay() -> Tensor:
    return torch.log1p(-(2.0 ** -(5.0 + torch.arange(H, dtype=torch.float64))))


def ours_gated_delta_product(shard: hsp.Shard, S: Tensor | None = None, **x: Tensor) -> Outputs:
    """By the mixer's own rule of laying writes one after the other."""
    shape = MixerShape(heads=H, key=K, value=V, groups=G, steps=STEPS, delta=True, decay="scalar")
    rule = DeltaProductRule(1, shape, negative=False)
    told = RecurrenceInputs(x["q"], x["k"].flatten(2, 3), x["v"].flatten(2, 3), x["log_decay"], x["beta"].flatten(2, 3))
    q, k, v, log_decay, beta, *_ = rule.interleaved(told)
    o, S = hsp.delta_rule(
        q, k, v, beta=beta, log_decay=log_decay, steps=STEPS, initial_state=S, return_final_state=True, shard=shard
    )
    return o[:, STEPS - 1 :: STEPS], S


def ours_comba(shard: hsp.Shard, feedback: Tensor, **x: Tensor) -> Outputs:
    inputs = with_feedback(RecurrenceInputs(**x), feedback)
    return [hsp.delta_rule(*inputs[:3], log_decay=inputs.log_decay, beta=inputs.beta, shard=shard)]


def ours_hgrn(v: Tensor, log_decay: Tensor, shard: hsp.Shard, S: Tensor | None = None) -> Outputs:
    """H * V heads, whose key and value have one channel."""
    ones = torch.ones(*v.shape[:2], H * V, 1, dtype=v.dtype)
    o, S = hsp.linear_attention(
        ones,
        ones,
        v.flatten(2)[..., None],
        log_decay=log_decay.flatten(2),
        initial_state=None if S is None else S.flatten(1)[..., None, None],
        return_final_state=True,
        shard=shard,
    )
    return o.view_as(v), S.view(-1, H, V)


# Both.


def document_by_document(read: Callable[..., Outputs], inputs: Tensors, bounds: Sequence[int]) -> Outputs:
    documents = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        part = {name: x[:, start:end] if name in BY_TOKEN else x for name, x in inputs.items()}
        documents.append(read(**{name: x for name, x in part.items() if name not in ("S", "z") or start == 0}))
    return torch.cat([document[0] for document in documents], 1), *documents[-1][1:]


def results(read: Callable[..., Outputs], inputs: Tensors) -> Tensors:
    """Outputs, and the gradients of the inputs for random ones of the outputs."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = dict(zip(("o", "S", "z"), read(leaves), strict=False))
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return outputs | {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def errors() -> Errors:
    sp = hsp.SequenceParallel(None)
    forms = {"batch": (2, None), "packed": (1, DOCUMENTS)}
    found: Errors = {}
    for form, (batch, documents) in forms.items():
        shard = sp.shard(TOKENS, documents)
        for name, (inputs, theirs, ours) in comparisons(batch).items():
            bounds = documents or (0, TOKENS)
            want = results(lambda x, read=theirs, at=bounds: document_by_document(read, x, at), inputs)
            wide = {key: x.double() for key, x in inputs.items()}
            got = results(lambda x, read=ours, shard=shard: read(**x, shard=shard), wide)
            assert got.keys() == want.keys(), (name, got.keys(), want.keys())
            found.setdefault(name, {}).update({f"{form} {key}": relative(got[key], want[key]) for key in got})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    report(errors())
