"""Our mixers against the layers of transformers: outputs, the input's gradient and every weight's."""

from __future__ import annotations

import pytest

from tests.external.program import Errors, errors_of
from tests.support.packages import needs

pytestmark = needs("transformers")  # which needs Python 3.11

BOUND = 1e-5  # they compute in float32 inside
GATED = {"d rule.steps.A_log", "d rule.steps.dt_bias"}
LOW_RANK = {"d rule.steps.project.0.weight", "d rule.steps.project.1.weight", "d gate.0.weight", "d gate.1.weight"}
EVERY = {"y", "dx", "d project.linear.weight", "d norm.weight", "d output.weight"}
ATTENTION = {"y", "dx", "d project.linear.weight", "d q_norm.weight", "d k_norm.weight", "d output.weight"}
LATENT = {f"d {name}.weight" for name in ("q.0", "q.1", "q.2", "down", "norm", "up")}
MODELS = {  # what is compared, of a batch and of packed documents
    "Qwen3-Next": EVERY | GATED | {"d conv.weight", "d rule.beta.weight", "d rule.steps.project.weight"},
    "Qwen3-Next attention": ATTENTION,
    "Qwen3-Next attention by YaRN": ATTENTION,
    "Kimi Linear": EVERY | GATED | LOW_RANK | {"d conv.weight", "d rule.beta.weight"},
    "Kimi Linear attention": {"y", "dx", "d output.weight", *LATENT},
    "Ling 3": EVERY | GATED | {"d conv.weight", "d rule.beta.weight", "d rule.steps.project.weight"},
    "Mamba-2": EVERY | GATED | {"d conv.weight", "d conv.bias", "d rule.steps.project.weight", "d rule.D"},
    "Nemotron-H": EVERY | GATED | {"d conv.weight", "d conv.bias", "d rule.steps.project.weight", "d rule.D"},
    "Nemotron-H attention": {"y", "dx", "d project.linear.weight", "d output.weight"},
    "MiniMax": EVERY,
    "LFM2": {"y", "dx", "d project.weight", "d conv.weight", "d output.weight"},
}
EXPERTS = {f"d {name}" for name in ("router.weight", "experts.input", "experts.output")} | {"y", "dx"}
EXPERTS |= {"d shared.input.weight", "d shared.output.weight"}
MAMBA = {"project.linear.weight", "conv.weight", "conv.bias", "output.weight"}
MAMBA |= {f"rule.{name}" for name in ("D", "steps.A_log", "steps.dt_bias", "steps.project.weight")}
BLOCKS = {
    "Qwen3-Next experts": EXPERTS | {"d shared_gate.weight"},
    "Kimi Linear experts": EXPERTS,
    "Falcon-H1 block": {"y", "dx", "d mixer_norm.weight", "d mlp_norm.weight", "d mlp.input.weight"}
    | {"d mlp.output.weight", *(f"d mixer.mixers.mamba2.{name}" for name in MAMBA)}
    | {f"d mixer.mixers.softmax.{name}" for name in ("project.linear.weight", "output.weight")},
}


@pytest.fixture(scope="module")
def errors() -> Errors:
    return errors_of("transformers_layers") | errors_of("transformers_blocks")


@pytest.mark.parametrize("model", MODELS | BLOCKS)
def test_agrees_with_transformers(errors: Errors, model: str) -> None:
    found = errors[model]
    assert found.keys() == {f"{form} {name}" for form in ("batch", "packed") for name in (MODELS | BLOCKS)[model]}
    assert {name: error for name, error in found.items() if not error <= BOUND} == {}


def test_nothing_else_is_reported(errors: Errors) -> None:
    assert errors.keys() == (MODELS | BLOCKS).keys()
