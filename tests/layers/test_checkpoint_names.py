"""The names and shapes of parameters, which checkpoints rest on: a model loads what an earlier commit saved."""

from __future__ import annotations

import re

import pytest
from torch import nn

from layers.config import ModelConfig
from layers.model import HybridLM
from layers.registry import BlockContext, mixer_spec

CONTEXT = BlockContext(dim=32, heads=4, kv_heads=2, layer=1, depth=4, norm_eps=1e-6, rope_base=100.0)
NAMES = """
based
    project.linear.weight[160,32] output.weight[32,32]
comba
    project.linear.weight[144,32] conv.weight[96,4] rule.feedback[4] rule.correction[4]
    rule.delta.beta.weight[4,32] rule.delta.steps.A_log[4] rule.delta.steps.dt_bias[4]
    rule.delta.steps.project.weight[4,32] norm.weight[12] output.weight[32,48]
delta_net
    project.linear.weight[96,32] conv.weight[96,4] rule.beta.weight[4,32] norm.weight[8] output.weight[32,32]
gated_delta_net
    project.linear.weight[144,32] conv.weight[96,4] rule.beta.weight[4,32] rule.steps.A_log[4]
    rule.steps.dt_bias[4] rule.steps.project.weight[4,32] norm.weight[12] output.weight[32,48]
gated_delta_product
    project.linear.weight[216,32] conv.weight[168,4] rule.write.beta.weight[8,32] rule.write.steps.A_log[4]
    rule.write.steps.dt_bias[4] rule.write.steps.project.weight[4,32] norm.weight[12] output.weight[32,48]
gla
    project.linear.weight[96,32] rule.low_rank.0.weight[16,32] rule.low_rank.1.weight[16,16]
    rule.low_rank.1.bias[16] norm.weight[8] output.weight[32,32]
hgrn2
    project.linear.weight[96,32] rule.bound[32] norm.weight[32] output.weight[32,32]
kda
    project.linear.weight[96,32] conv.weight[96,4] rule.beta.weight[4,32] rule.steps.A_log[4]
    rule.steps.dt_bias[32] rule.steps.project.0.weight[8,32] rule.steps.project.1.weight[32,8] norm.weight[8]
    gate.0.weight[8,32] gate.1.weight[32,8] output.weight[32,32]
lightning
    project.linear.weight[128,32] norm.weight[32] output.weight[32,32]
linear
    project.linear.weight[96,32] norm.weight[8] output.weight[32,32]
mamba2
    project.linear.weight[384,32] conv.weight[320,4] conv.bias[320] rule.D[4] rule.steps.A_log[4]
    rule.steps.dt_bias[4] rule.steps.project.weight[4,32] norm.weight[64] output.weight[32,64]
rebased
    project.linear.weight[160,32] rule.gamma[128] rule.beta[128] output.weight[32,32]
retention
    project.linear.weight[192,32] norm.weight[16] output.weight[32,64]
rwkv6
    mix_first[32] mix[160] mix_down[32,5,32] mix_up[5,32,32] decay[32] decay_down[32,64] decay_up[64,32]
    bonus[32] norm_weight[32] norm_bias[32] receptance.weight[32,32] key.weight[32,32] value.weight[32,32]
    gate.weight[32,32] output.weight[32,32]
short_conv
    project.weight[96,32] conv.weight[32,3] output.weight[32,32]
sliding_window
    project.linear.weight[64,32] output.weight[32,32]
softmax
    project.linear.weight[64,32] output.weight[32,32]
delta_net-output_gate
    project.linear.weight[128,32] conv.weight[96,4] rule.beta.weight[4,32] norm.weight[8] output.weight[32,32]
model
    blocks.0.mixer_norm.weight[32] blocks.0.mixer.project.linear.weight[96,32] blocks.0.mixer.norm.weight[8]
    blocks.0.mixer.output.weight[32,32] blocks.0.mlp_norm.weight[32] blocks.0.mlp.input.weight[192,32]
    blocks.0.mlp.output.weight[32,96] embedding.weight[32,32] norm.weight[32] head.weight[32,32]
"""


def promised() -> dict[str, list[str]]:
    """Names with shapes, by the mixer that has them; a mixer's name may have options that are set after it."""
    entries = (entry.split() for entry in re.split(r"\n(?=\S)", NAMES.strip()))
    return {name: parameters for name, *parameters in entries}


def names(module: nn.Module) -> list[str]:
    return [f"{name}[{','.join(map(str, tensor.shape))}]" for name, tensor in module.state_dict().items()]


@pytest.mark.parametrize("entry", [name for name in promised() if name != "model"])
def test_the_parameters_of_a_mixer_keep_their_names(entry: str) -> None:
    name, *options = entry.split("-")
    mixer = mixer_spec(name, **dict.fromkeys(options, True)).build(CONTEXT)
    assert isinstance(mixer, nn.Module) and names(mixer) == promised()[entry]


def test_the_parameters_of_a_model_keep_their_names() -> None:
    model = HybridLM(ModelConfig(vocab=32, dim=32, depth=1, heads=4, pattern=["linear"]))
    assert names(model) == promised()["model"]
