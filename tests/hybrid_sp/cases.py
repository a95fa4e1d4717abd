"""Calls of every operator, for the tests that hold them against the token loops, alone and on P ranks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives
from tests.support.oracle import delta_rule_loop, linear_attention_loop, short_conv_loop, softmax_attention_loop

LENGTH = 107  # odd, and no multiple of any number of spans used here
# Documents of one token, documents that begin with a rank's tokens (of 4: at 26 and 53), several on one rank; one over
# more than two ranks.
SHORT_DOCUMENTS = (0, 1, 26, 27, 53, 54, 60, 107)
LONG_DOCUMENTS = (0, 5, 100, 107)


@dataclass(frozen=True)
class Case:
    """One call of an operator: linear, delta, softmax, latent, conv (of `width` taps) or shift.

    `decay` is None, "fixed", "scalar" or "vector". `strong` is "" or says which decays leave nothing of a state: "some"
    (from -1e4 down to the smallest float, beside others that keep nearly all) or "all". `documents` are packed. Values
    of softmax attention have `value` columns, and of the columns of a latent key `shared` are those of all heads."""

    operator: str = "linear"
    decay: str | None = None
    strong: str = ""
    groups: int = 4
    heads: int = 4
    bonus: bool = False
    normalize: bool = False
    causal: bool = True
    states: bool = False
    window: int | None = None
    value: int = 6
    shared: int = 2
    sinks: bool = False
    width: int = 4
    bias: bool = False
    documents: tuple[int, ...] | None = None
    length: int = LENGTH
    layout: str = "contiguous"
    overlap: bool = True
    linear: str = "all_gather"
    softmax: str = "all_gather"
    kv_heads_per_gather: int | None = None
    keep_kv: bool = True
    backend: str = "auto"
    seed: int = 0

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Leaves of the whole sequence, the same on every rank."""
        make = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        B, L, H, G, K = 2 if self.documents is None else 1, self.length, self.heads, self.groups, 6
        V = self.value if self.operator == "softmax" else 5
        if self.operator in ("conv", "shift"):
            x = {"x": normal(B, L, 7)}
            if self.operator == "conv":
                x["weight"] = normal(7, self.width)
            if self.bias:
                x["bias"] = normal(7)
            if self.states:
                x["initial"] = normal(B, self.width - 1 if self.operator == "conv" else 1, 7)
            wide = torch.promote_types(dtype, torch.float32)  # of parameters, whose gradients are summed over ranks
            return {name: value.to(dtype if name in ("x", "initial") else wide) for name, value in x.items()}

        if self.operator == "latent":
            R, C = self.shared, 5
            x = {"q": normal(B, L, H, K), "latent": normal(B, L, C), "rope_k": normal(B, L, R)}
            x |= {"w_k": normal(H, K - R, C), "w_v": normal(H, self.value, C)}
            return {name: value.to(dtype) for name, value in x.items() if name != "rope_k" or R}

        x = {"q": normal(B, L, H if self.operator == "softmax" else G, K), "k": normal(B, L, G, K)}
        x["v"] = normal(B, L, G if self.operator == "softmax" else H, V)
        if self.sinks:
            x["sinks"] = normal(H)
        if self.operator == "delta":
            x["k"] = x["k"] / x["k"].norm(dim=-1, keepdim=True)
            x["beta"] = 2 * normal(B, L, H).sigmoid()
        if self.normalize:
            x["q"], x["k"] = x["q"].abs(), x["k"].abs()
        decays = {"fixed": (H,), "scalar": (B, L, H), "vector": (B, L, H, K)}
        if self.decay is not None:
            x["log_decay"] = -0.3 * normal(*decays[self.decay]).abs()
            smallest = torch.finfo(torch.promote_types(dtype, torch.float32)).min
            if self.strong == "some":
                sizes = torch.tensor([-1e4, -1e9, -1e13, -1e30, smallest], dtype=torch.float64)
                drawn = torch.randint(12, x["log_decay"].shape, generator=make)
                x["log_decay"] = torch.where(drawn < 5, sizes[drawn % 5], x["log_decay"] * 0.1 ** (drawn % 3))
            elif self.strong:
                x["log_decay"].fill_(smallest)
        if self.bonus:
            x["bonus"] = normal(H, K).abs() if self.normalize else normal(H, K)
        if self.states:
            x["initial"] = normal(B, H, K, V)
            if self.normalize:
                x["initial_z"] = normal(B, H, K).abs()
        wide = torch.promote_types(dtype, torch.float32)  # states and decays
        return {name: value.to(dtype if name in "qkv" else wide) for name, value in x.items()}

    def whole(self, name: str) -> bool:
        """Whether every rank has all of this input, and its gradient is the sum over ranks."""
        return name in ("bonus", "initial", "initial_z", "weight", "bias", "sinks", "w_k", "w_v") or (
            name == "log_decay" and self.decay == "fixed"
        )

    def call(self, x: dict[str, Tensor], shard: hsp.Shard | None) -> tuple[Tensor, list[Tensor]]:
        """Output and final states of the operator under test."""
        states: dict[str, Any] = {"initial_state": x.get("initial"), "return_final_state": self.states}
        if self.operator in ("linear", "delta"):
            states["backend"] = self.backend
        match self.operator:
            case "softmax":
                given: dict[str, Any] = {"causal": self.causal, "window": self.window, "backend": self.backend}
                out = hsp.softmax_attention(x["q"], x["k"], x["v"], sinks=x.get("sinks"), shard=shard, **given)
            case "latent":
                w, parts = (x["w_k"], x["w_v"]), (x["q"], x["latent"], x.get("rope_k"))
                out = hsp.latent_attention(*parts, *w, shard=shard, causal=self.causal, backend=self.backend)
            case "conv":
                activation = "silu" if self.bias else None
                out = hsp.short_conv(x["x"], x["weight"], x.get("bias"), activation=activation, shard=shard, **states)
            case "shift":
                out = hsp.token_shift(x["x"], shard=shard, **states)
            case "delta":
                out = hsp.delta_rule(
                    x["q"], x["k"], x["v"], beta=x["beta"], log_decay=x.get("log_decay"), shard=shard, **states
                )
            case _:
                if "initial_z" in x:
                    states["initial_state"] = x["initial"], x["initial_z"]
                out = hsp.linear_attention(
                    x["q"],
                    x["k"],
                    x["v"],
                    log_decay=x.get("log_decay"),
                    bonus=x.get("bonus"),
                    shard=shard,
                    causal=self.causal,
                    normalize=self.normalize,
                    **states,
                )
        if not self.states:
            return out, []
        return out[0], list(out[1]) if self.normalize else [out[1]]

    def loop(self, x: dict[str, Tensor], **options: bool) -> tuple[Tensor, list[Tensor]]:
        """The same by the token loop, document by document: the initial state continues the first one. Options are of
        the loop of operators that have a denominator."""
        outputs, finals = [], []
        for start, end in itertools.pairwise(self.documents or (0, self.length)):
            here = {name: value if self.whole(name) else value[:, start:end] for name, value in x.items()}
            if start:
                here = {name: value for name, value in here.items() if not name.startswith("initial")}
            o, finals = self._loop(here, **options)
            outputs.append(o)
        return torch.cat(outputs, 1), finals if self.states else []

    def _loop(self, x: dict[str, Tensor], **options: bool) -> tuple[Tensor, list[Tensor]]:
        initial = x.get("initial")
        match self.operator:
            case "softmax":
                return softmax_attention_loop(**x, causal=self.causal, window=self.window, **options), []
            case "latent":
                k, v = (torch.einsum("blc,hnc->blhn", x["latent"], x[name]) for name in ("w_k", "w_v"))
                if "rope_k" in x:
                    k = torch.cat([k, x["rope_k"].unsqueeze(2).expand(*k.shape[:3], -1)], -1)
                return softmax_attention_loop(x["q"], k, v, causal=self.causal, **options), []
            case "conv" | "shift":
                weight = x["weight"] if self.operator == "conv" else x["x"].new_tensor([[1.0, 0.0]]).expand(7, 2)
                o, final = short_conv_loop(x["x"], weight, x.get("bias"), silu=self.bias, initial_state=initial)
            case "delta":
                o, final = delta_rule_loop(x["q"], x["k"], x["v"], x["beta"], x.get("log_decay"), initial_state=initial)
            case _:
                o, final = linear_attention_loop(
                    x["q"],
                    x["k"],
                    x["v"],
                    x.get("log_decay"),
                    bonus=x.get("bonus"),
                    causal=self.causal,
                    normalize=self.normalize,
                    initial_state=(initial, x["initial_z"]) if "initial_z" in x else initial,
                    **options,
                )
        return o, list(final) if isinstance(final, tuple) else [final]


def weights(like: Tensor, seed: int) -> Tensor:
    """Gradient that the loss gives an output."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


def truth(case: Case, dtype: torch.dtype = torch.float64, **options: bool) -> dict[str, Tensor]:
    """Outputs and gradients of the whole sequence by the token loop, in fp64 on inputs rounded to dtype."""
    x = {name: value.double().requires_grad_() for name, value in case.inputs(dtype).items()}
    o, finals = case.loop(x, **options)
    outputs = {"o": o, **{f"final{i}": final for i, final in enumerate(finals)}}
    given = [weights(outputs["o"], 0).to(dtype), *(weights(x, i + 1) for i, x in enumerate(finals))]
    given = [w.double() for w in given]
    grads = torch.autograd.grad(list(outputs.values()), list(x.values()), given, materialize_grads=True)
    return {k: v.detach() for k, v in outputs.items()} | {f"d{n}": g for n, g in zip(x, grads, strict=True)}


def terms(case: Case, name: str) -> Tensor:
    """The terms that may cancel in a gradient of the whole sequence: see the oracle. Zero where there are none."""
    if name.startswith("d") and (case.operator in ("softmax", "latent") or case.normalize):
        return truth(case, fixed_denominator=True)[name]
    return torch.zeros(())


def measured(
    case: Case, group: Any, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> dict[str, Tensor]:
    """What this rank computes, with gradients of replicated inputs summed over ranks."""
    sp = hsp.SequenceParallel(
        group,
        layout=case.layout,
        linear=case.linear,
        softmax=case.softmax,
        kv_heads_per_gather=case.kv_heads_per_gather,
        keep_kv=case.keep_kv,
        overlap=case.overlap,
        check="calls",
    )
    shard = sp.shard(case.length, case.documents)
    x = {name: v if case.whole(name) else shard.take(v) for name, v in case.inputs(dtype).items()}
    x = {name: value.detach().to(device).requires_grad_() for name, value in x.items()}
    o, finals = case.call(x, shard)
    whole = o.new_empty(o.shape[0], case.length, *o.shape[2:])
    loss = (o * shard.take(weights(whole, 0))).sum(dtype=torch.promote_types(dtype, torch.float32))
    for i, final in enumerate(finals):  # every rank gives the final state a different part of its gradient
        parts = torch.arange(1, sp.size + 1, dtype=final.dtype, device=device)
        loss = loss + (final * weights(final, i + 1)).sum() * parts[sp.rank] / parts.sum()
    grads = torch.autograd.grad(loss, list(x.values()))
    got = {"o": o.detach(), **{f"final{i}": final.detach() for i, final in enumerate(finals)}}
    for name, grad in zip(x, grads, strict=True):
        if case.whole(name):  # as sum_gradients does it, in fp32 at least
            grad = collectives.all_reduce(
                grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True), group, tag="test"
            )
        got[f"d{name}"] = grad
    return got


def linear_cases() -> list[Case]:
    cases = [Case(decay=d, states=s) for d in (None, "fixed", "scalar", "vector") for s in (False, True)]
    cases += [Case(decay=d, groups=2, normalize=n, states=n) for d in (None, "scalar", "vector") for n in (True, False)]
    cases += [Case(decay=d, bonus=True, states=d != "scalar") for d in (None, "fixed", "scalar", "vector")]
    cases += [Case(decay="vector", bonus=True, normalize=True, groups=2)]
    for documents in (SHORT_DOCUMENTS, LONG_DOCUMENTS):
        kinds = (None, "fixed", "scalar", "vector")
        cases += [Case(decay=d, documents=documents, states=documents == LONG_DOCUMENTS) for d in kinds]
        cases += [Case(decay="vector", bonus=True, documents=documents, states=documents == SHORT_DOCUMENTS)]
    cases += [Case(causal=False), Case(causal=False, normalize=True, groups=1)]
    return cases


def delta_cases() -> list[Case]:
    cases = [Case(operator="delta", decay=d, states=s) for d in (None, "scalar", "vector") for s in (False, True)]
    cases += [Case(operator="delta", decay=d, groups=2) for d in (None, "scalar", "vector")]
    for documents in (SHORT_DOCUMENTS, LONG_DOCUMENTS):
        states = documents == LONG_DOCUMENTS
        cases += [
            Case(operator="delta", decay=d, documents=documents, states=states) for d in (None, "scalar", "vector")
        ]
    return cases


def softmax_cases() -> list[Case]:
    kinds = itertools.product((4, 2, 1), (True, False))
    cases = [Case(operator="softmax", groups=groups, causal=causal) for groups, causal in kinds]
    for documents in (None, SHORT_DOCUMENTS, LONG_DOCUMENTS):
        cases += [Case(operator="softmax", window=w, documents=documents, groups=2) for w in (1, 2, 16, 50, 200)]
    for documents in (SHORT_DOCUMENTS, LONG_DOCUMENTS):
        cases += [Case(operator="softmax", causal=c, documents=documents, groups=2) for c in (True, False)]
    wide = Case(operator="softmax", groups=2, sinks=True, value=10)
    cases += [wide, replace(wide, causal=False), replace(wide, window=16, value=3), replace(wide, groups=4, value=6)]
    cases += [replace(wide, documents=d, value=v) for d, v in ((SHORT_DOCUMENTS, 2), (LONG_DOCUMENTS, 9))]
    return cases


def latent_cases() -> list[Case]:
    base = Case(operator="latent", value=7, kv_heads_per_gather=3)
    cases = [base, replace(base, causal=False), replace(base, keep_kv=False), replace(base, shared=0, value=3)]
    cases += [replace(base, kv_heads_per_gather=None, keep_kv=False, causal=False, shared=5)]
    for documents in (SHORT_DOCUMENTS, LONG_DOCUMENTS):
        cases += [replace(base, documents=documents, causal=c, keep_kv=not c) for c in (True, False)]
    return cases


def halo_cases() -> list[Case]:
    """A width of 30 is more tokens than a span of 4 ranks has."""
    cases = []
    for documents, states in itertools.product((None, SHORT_DOCUMENTS, LONG_DOCUMENTS), (False, True)):
        cases += [Case(operator="shift", documents=documents, states=states)]
        widths = (2, 4, 30) if states else (1, 2, 4, 30)
        cases += [Case(operator="conv", width=w, bias=w == 4, documents=documents, states=states) for w in widths]
    return cases
