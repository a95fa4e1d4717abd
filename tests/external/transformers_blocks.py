"""Our experts and our block of mixers side by side against transformers, in the way of `transformers_layers`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layers.block import Block, FeedForward
from layers.moe import MoE, MoEConfig
from layers.registry import mixer_spec
from layers.side_by_side import SideBySideSpec
from tests.external.program import Errors, report
from tests.external.transformers_layers import CONTEXT, DIM, HEADS, Comparison, Weights, errors_of

# `transformers_layers` comes first, for it hides fla from transformers.
# isort: split
from transformers.models.falcon_h1.configuration_falcon_h1 import FalconH1Config
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1DecoderLayer, FalconH1RotaryEmbedding
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearMoE
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

EXPERTS, ACTIVE, WIDTH, SHARED = 6, 2, 10, 14


class Experts(MoE):
    """Experts called as a mixer is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(MoEConfig(experts=EXPERTS, active=ACTIVE, dim=WIDTH, shared=SHARED, **options), DIM, 1, 1)

    def forward(self, x: Tensor, *_: Any) -> tuple[Tensor, Any]:
        return super().forward(x)


def experts(w: Weights, shared: str) -> Weights:
    first = torch.cat([w[f"{shared}.gate_proj.weight"], w[f"{shared}.up_proj.weight"]])
    return {
        "router.weight": w["gate.weight"],
        "experts.input": w["experts.gate_up_proj"],
        "experts.output": w["experts.down_proj"],
        "shared.input.weight": first,
        "shared.output.weight": w[f"{shared}.down_proj.weight"],
    }


def qwen3_next_experts() -> Comparison:
    config = Qwen3NextConfig(
        hidden_size=DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED,
    )

    def rename(w: Weights) -> Weights:
        return experts(w, "shared_expert") | {"shared_gate.weight": w["shared_expert_gate.weight"]}

    return Comparison(theirs=Qwen3NextSparseMoeBlock(config), ours=Experts(shared_gate=True), rename=rename)


def kimi_linear_experts() -> Comparison:
    config = KimiLinearConfig(
        hidden_size=DIM,
        num_local_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        moe_intermediate_size=WIDTH,
        n_shared_experts=1,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = KimiLinearMoE(config)
    # A width of the shared expert that is no multiple of theirs cannot be said in their config.
    theirs.shared_experts = type(theirs.shared_experts)(config=config, intermediate_size=SHARED)
    bias = torch.linspace(-0.3, 0.3, EXPERTS)
    theirs.gate.e_score_correction_bias.copy_(bias)

    def load(w: Weights) -> Weights:
        return experts(w, "shared_experts") | {"bias": bias.double()}

    ours = Experts(router="sigmoid", scale=config.routed_scaling_factor, bias_rate=0.1)
    return Comparison(theirs=theirs, ours=ours, rename=lambda w: experts(w, "shared_experts"), load=load)


def falcon_h1_block() -> Comparison:
    state, kv_heads, width, inner = 8, 2, DIM // HEADS, 2 * DIM
    config = FalconH1Config(
        hidden_size=DIM,
        intermediate_size=SHARED,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=width,
        mamba_d_ssm=inner,
        mamba_n_heads=HEADS,
        mamba_d_head=inner // HEADS,
        mamba_d_state=state,
        mamba_chunk_size=32,
        mamba_rms_norm=False,
        rms_norm_eps=CONTEXT.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    config._attn_implementation = "eager"
    rotary = FalconH1RotaryEmbedding(config)
    theirs = FalconH1DecoderLayer(config, layer_idx=0)
    theirs.mamba.register_buffer("mup_vector", torch.ones(1, 1, 1), persistent=False)

    def rename(w: Weights) -> Weights:
        sizes = [inner, state, state]  # of x, B and C; ours lie in the order C, B, x, z
        z, x, B, C, dt = w["mamba.in_proj.weight"].split([inner, *sizes, HEADS])
        parts = {
            "mamba2.project.linear.weight": torch.cat([C, B, x, z]),
            "mamba2.conv.weight": torch.cat(w["mamba.conv1d.weight"].squeeze(1).split(sizes)[::-1]),
            "mamba2.conv.bias": torch.cat(w["mamba.conv1d.bias"].split(sizes)[::-1]),
            "mamba2.rule.steps.project.weight": dt,
            "mamba2.rule.steps.A_log": w["mamba.A_log"],
            "mamba2.rule.steps.dt_bias": w["mamba.dt_bias"],
            "mamba2.rule.D": w["mamba.D"],
            "mamba2.output.weight": w["mamba.out_proj.weight"],
            "softmax.project.linear.weight": torch.cat([w[f"self_attn.{name}_proj.weight"] for name in "qkv"]),
            "softmax.output.weight": w["self_attn.o_proj.weight"],
        }
        mlp = torch.cat([w["feed_forward.gate_proj.weight"], w["feed_forward.up_proj.weight"]])
        return {f"mixer.mixers.{name}": weight for name, weight in parts.items()} | {
            "mixer_norm.weight": w["input_layernorm.weight"],
            "mlp_norm.weight": w["pre_ff_layernorm.weight"],
            "mlp.input.weight": mlp,
            "mlp.output.weight": w["feed_forward.down_proj.weight"],
        }

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        count = x.shape[1]
        places = rotary(x, torch.arange(count)[None])
        mask = torch.full((count, count), float("-inf"), dtype=x.dtype).triu(1)[None, None]
        return layer(x, attention_mask=mask, position_embeddings=places)[0]

    specs = (("mamba2", mixer_spec("mamba2", state=state, norm=False)), ("softmax", mixer_spec("softmax")))
    context = replace(CONTEXT, kv_heads=kv_heads, rope_base=100.0)
    ours = Block(SideBySideSpec(specs=specs, join="sum"), context, FeedForward(SHARED))
    return Comparison(theirs=theirs, ours=ours, rename=rename, call=call)


def main() -> None:
    blocks = {
        "Qwen3-Next experts": qwen3_next_experts,
        "Kimi Linear experts": kimi_linear_experts,
        "Falcon-H1 block": falcon_h1_block,
    }
    errors: Errors = {name: errors_of(build()) for name, build in blocks.items()}
    report(errors)


if __name__ == "__main__":
    main()
