"""Gate parameters, of which decays are made, in a model of narrow weights: they stay fp32, whoever casts the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hybrid_sp as hsp
from layers.config import ModelConfig
from layers.mixers.gated_delta_product import DeltaProductRule
from layers.mixers.gla import GLARule
from layers.mixers.hgrn2 import HGRN2Rule
from layers.mixers.rwkv6 import RWKV6Mixer
from layers.mixers.short_conv import ShortConvMixer
from layers.model import HybridLM
from layers.registry import MIXERS
from layers.timestep import TimeStep
from tests.layers.cases import CASES, CONTEXT, Case, tokens
from tests.support.oracle import relative

every_case = pytest.mark.parametrize("case", CASES, ids=str)
NARROW = (torch.bfloat16, torch.float16)


class Decays(Exception):
    """Carries the log decays, or None, out of the operator that a mixer calls."""


def log_decays(mixer: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor | None:
    def catch(*_: Any, log_decay: Tensor | None = None, **__: Any) -> None:
        raise Decays(log_decay)

    with monkeypatch.context() as patch:
        for operator in ("linear_attention", "delta_rule", "softmax_attention", "latent_attention"):
            patch.setattr(hsp, operator, catch)
        try:
            mixer(x)
        except Decays as caught:
            decays: Tensor | None = caught.args[0]
            return decays
    assert isinstance(mixer, ShortConvMixer), "a mixer without an operator that could decay"
    return None


def gates(case: Case, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The parameters that make decays by themselves: those with a gradient where the input, and so every product of it
    with a matrix, is zero."""
    mixer = case.build()
    decays = log_decays(mixer, torch.zeros_like(tokens(3)), monkeypatch)
    if decays is None or not decays.requires_grad:
        return set()
    decays.sum().backward()
    return {name for name, p in mixer.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_mixers_whose_decays_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {case.mixer for case in CASES if gates(case, monkeypatch)}
    deltas = {"gated_delta_net", "gated_delta_product", "kda", "comba"}
    assert found == {"gla", "hgrn2", "rwkv6", "mamba2", *deltas} <= set(MIXERS)


@every_case
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_makes_decays_stays_fp32_and_the_rest_is_narrow(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, mixer = gates(case, monkeypatch), case.build(torch.float32)
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    for p in mixer.parameters():
        p.grad = torch.ones_like(p)
    mixer.to(dtype)
    for name, p in mixer.named_parameters():
        assert p.dtype == p.grad.dtype == (torch.float32 if name in wide else dtype), name
        assert torch.equal(p, before[name].to(p.dtype)), name
    assert {p.dtype for p in mixer.double().parameters()} == {torch.float64}


@every_case
def test_decays_are_those_of_the_gate_parameters_and_not_of_rounded_ones(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At input zero the log decay is a function of the gate parameters alone, and so exact up to fp32's rounding."""
    x = torch.zeros_like(tokens(3))
    exact = case.build(torch.float32)
    got = log_decays(copy.deepcopy(exact).to(torch.bfloat16), x.bfloat16(), monkeypatch)
    want = log_decays(exact.double(), x, monkeypatch)
    if want is None or got is None:
        assert got is want is None
        return
    assert got.dtype in (torch.float32, torch.float64)
    assert relative(got, want) < 1e-6


def from_activations(mixer: nn.Module, exact: nn.Module, x: Tensor) -> Tensor | None:
    """By the mixer's formula: the log decay in fp64 of the gates of `exact` and the activations of `mixer`."""
    if isinstance(mixer, RWKV6Mixer):
        mixed = mixer.mixed(x, F.pad(x, (0, 0, 1, 0))[:, :-1])[0]
        told = torch.tanh(mixed @ mixer.decay_down) @ mixer.decay_up
        return -torch.exp(exact.decay.double() + told.double()).unflatten(-1, (mixer.heads, -1))
    rule, exact_rule = getattr(mixer, "rule", None), getattr(exact, "rule", None)
    if isinstance(rule, GLARule):
        gate = F.linear(rule.low_rank[0](x), rule.low_rank[1].weight).double()
        gate = gate + exact_rule.low_rank[1].bias.double()
        return (F.logsigmoid(gate) / rule.temperature).unflatten(-1, (CONTEXT.heads, -1))
    if isinstance(rule, HGRN2Rule) and rule.bound is not None:
        _, logit, _ = mixer.project(x)
        b = torch.sigmoid(exact_rule.bound.double()).view(logit.shape[2:])
        return torch.log(b + (1 - b) * torch.sigmoid(logit.double()))
    (place, steps), *_ = [(name, one) for name, one in mixer.named_modules() if isinstance(one, TimeStep)] or [
        ("", None)
    ]
    if steps is not None:
        exact_steps = exact.get_submodule(place)
        step = steps.project(x).double() + exact_steps.dt_bias.double()
        rate = exact_steps.A_log.double().exp()
        if steps.width is not None:
            step, rate = step.unflatten(-1, (-1, steps.width)), rate[:, None]
        bound = steps.lower_bound
        decays = bound * torch.sigmoid(rate * step) if bound else -rate * F.softplus(step)
        if isinstance(rule, DeltaProductRule):  # later writes of a token do not decay
            decays = F.pad(decays[:, :, None], (0, 0, 0, rule.writes - 1)).flatten(1, 2)
        return decays
    return None


@every_case
def test_log_decays_in_bf16_are_those_of_fp32_gates_and_bf16_activations(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = case.build(torch.float32)
    mixer, x = copy.deepcopy(exact).to(torch.bfloat16), tokens(9).bfloat16()
    with torch.no_grad():
        want, got = from_activations(mixer, exact, x), log_decays(mixer, x, monkeypatch)
    assert (want is not None) == bool(gates(case, monkeypatch)), "a mixer with learned decays has its formula here"
    if want is not None:
        assert got is not None and relative(got, want) < 1e-6


def test_a_model_that_a_user_casts_keeps_its_gates() -> None:
    """`to`, `bfloat16` and `half` alike, on the way to another device, and twice; `double` widens all."""
    names = ["mamba2", "kda", "gla", "hgrn2", "rwkv6", "softmax"]
    model = HybridLM(ModelConfig(dim=16, depth=6, heads=2, pattern=names))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wide = {name for name in before if name.endswith(("A_log", "dt_bias", "low_rank.1.bias", "bound", ".decay"))}
    assert len(wide) == 7
    for cast in (HybridLM.bfloat16, HybridLM.half, lambda one: one.to("cpu", torch.bfloat16)):
        cast(model)
        assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == wide
        assert all(torch.equal(model.get_parameter(name), before[name]) for name in wide)
    assert model.to("meta").get_parameter("blocks.0.mixer.rule.steps.A_log").dtype == torch.float32
    assert {p.dtype for p in HybridLM(model.config).double().parameters()} == {torch.float64}
