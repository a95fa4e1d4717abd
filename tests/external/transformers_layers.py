"""Our mixers on one device (float64) against the layers of transformers, whose torch paths compute in float32 inside.

The layers' weights are copied across. Outputs, the gradient of the input and the gradients of every weight, of a batch
and of packed documents: theirs read one document after another, ours all at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hybrid_sp as hsp
from layers.recurrence import MixerShape, RecurrenceInputs, RecurrentMixer
from layers.registry import BlockContext, mixer_spec
from layers.rotary import RopeScaling
from tests.external.program import Errors, report
from tests.support.oracle import relative

sys.modules["fla"] = None  # type: ignore[assignment]  # else transformers takes the kernels of fla
from transformers.models.bailing_hybrid.configuration_bailing_hybrid import BailingHybridConfig  # noqa: E402
from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridDeltaAttention  # noqa: E402
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig  # noqa: E402
from transformers.models.kimi_linear.modeling_kimi_linear import (  # noqa: E402
    KimiLinearAttention,
    KimiLinearDeltaAttention,
)
from transformers.models.lfm2.configuration_lfm2 import Lfm2Config  # noqa: E402
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv  # noqa: E402
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config  # noqa: E402
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer  # noqa: E402
from transformers.models.minimax.configuration_minimax import MiniMaxConfig  # noqa: E402
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention  # noqa: E402
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig  # noqa: E402
from transformers.models.nemotron_h.modeling_nemotron_h import (  # noqa: E402
    NemotronHAttention,
    NemotronHMamba2Mixer,
)
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig  # noqa: E402
from transformers.models.qwen3_next.modeling_qwen3_next import (  # noqa: E402
    Qwen3NextAttention,
    Qwen3NextGatedDeltaNet,
    Qwen3NextRotaryEmbedding,
)

DIM, HEADS, TOKENS = 24, 4, 139
DOCUMENTS = (0, 1, 3, 70, 71, TOKENS)  # some shorter than a convolution, one longer than a chunk of theirs
CONTEXT = BlockContext(dim=DIM, heads=HEADS, kv_heads=HEADS, layer=0, depth=2, norm_eps=1e-5, rope_base=1e4)

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`rename` gives what belongs to our parameters, in our order of channels, from what belongs to theirs; `load` the
    weights themselves, if they differ."""

    theirs: nn.Module
    ours: nn.Module
    rename: Callable[[Weights], Weights]
    load: Callable[[Weights], Weights] | None = None
    call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)


def qwen3_next() -> Comparison:
    G, K, V = 2, 6, 12
    config = Qwen3NextConfig(
        hidden_size=DIM,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=G,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        rms_norm_eps=CONTEXT.norm_eps,
    )

    def rename(w: Weights) -> Weights:
        # Theirs are cut into key heads first; ours into q, k, v and gate first.
        shared = HEADS // G
        by_key_head = w["in_proj_qkvz.weight"].unflatten(0, (G, -1)).split([K, K, shared * V, shared * V], dim=1)
        beta, decay = w["in_proj_ba.weight"].unflatten(0, (G, -1)).split([shared, shared], dim=1)
        return {
            "project.linear.weight": torch.cat([rows.flatten(0, 1) for rows in by_key_head]),
            "conv.weight": w["conv1d.weight"].squeeze(1),
            "rule.beta.weight": beta.flatten(0, 1),
            "rule.steps.project.weight": decay.flatten(0, 1),
            "rule.steps.A_log": w["A_log"],
            "rule.steps.dt_bias": w["dt_bias"],
            "norm.weight": w["norm.weight"],
            "output.weight": w["out_proj.weight"],
        }

    ours = mixer_spec("gated_delta_net", expand_k=K * HEADS / DIM, expand_v=V * HEADS / DIM, key_heads=G).build(CONTEXT)
    return Comparison(theirs=Qwen3NextGatedDeltaNet(config, layer_idx=0), ours=ours, rename=rename)


def causal_mask(x: Tensor) -> Tensor:
    """The mask of eager attention over the tokens of x."""
    count = x.shape[1]
    return torch.full((count, count), float("-inf"), dtype=x.dtype).triu(1)[None, None]


def qwen3_next_attention(scaling: RopeScaling | None = None) -> Comparison:
    K, G = 32, 2
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}
    if scaling is not None:
        yarn = {"rope_type": "yarn", "factor": scaling.factor}
        rope |= yarn | {"original_max_position_embeddings": scaling.original_length}
    config = Qwen3NextConfig(
        hidden_size=DIM,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_attention_heads=HEADS,
        num_key_value_heads=G,
        head_dim=K,
        rms_norm_eps=CONTEXT.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=4 * TOKENS,
    )
    config._attn_implementation = "eager"
    rotary = Qwen3NextRotaryEmbedding(config)

    def rename(w: Weights) -> Weights:
        q, gate = w["q_proj.weight"].unflatten(0, (HEADS, 2, K)).unbind(1)
        rows = [q.flatten(0, 1), w["k_proj.weight"], w["v_proj.weight"], gate.flatten(0, 1)]
        return {
            "project.linear.weight": torch.cat(rows),
            "q_norm.weight": w["q_norm.weight"],
            "k_norm.weight": w["k_norm.weight"],
            "output.weight": w["o_proj.weight"],
        }

    def shifted(w: Weights) -> Weights:  # their norms multiply by 1 + weight
        return {name: rows + 1 if "norm" in name else rows for name, rows in rename(w).items()}

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        places = rotary(x, torch.arange(x.shape[1])[None])
        return layer(x, places, causal_mask(x))[0]

    context = replace(CONTEXT, kv_heads=G, rope_base=100.0, rope_scaling=scaling)
    ours = mixer_spec("softmax", head_dim=K, qk_norm=True, rope_fraction=0.25, gate="channel").build(context)
    theirs = Qwen3NextAttention(config, layer_idx=0)
    return Comparison(theirs=theirs, ours=ours, rename=rename, load=shifted, call=call)


def kimi_linear() -> Comparison:
    config = KimiLinearConfig(
        hidden_size=DIM,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=HEADS,
        linear_head_dim=DIM // HEADS,
        rms_norm_eps=CONTEXT.norm_eps,
    )

    def rename(w: Weights) -> Weights:
        return {
            "project.linear.weight": torch.cat([w[f"{name}_proj.weight"] for name in "qkv"]),
            "conv.weight": w["conv1d.weight"].squeeze(1),
            "rule.beta.weight": w["b_proj.weight"],
            "rule.steps.project.0.weight": w["forget_gate.f_a_proj.weight"],
            "rule.steps.project.1.weight": w["forget_gate.f_b_proj.weight"],
            "rule.steps.A_log": w["forget_gate.A_log"].flatten(),
            "rule.steps.dt_bias": w["forget_gate.dt_bias"],
            "gate.0.weight": w["g_a_proj.weight"],
            "gate.1.weight": w["g_b_proj.weight"],
            "norm.weight": w["o_norm.weight"],
            "output.weight": w["o_proj.weight"],
        }

    ours = mixer_spec("kda").build(CONTEXT)
    return Comparison(theirs=KimiLinearDeltaAttention(config, layer_idx=0), ours=ours, rename=rename)


def kimi_linear_attention() -> Comparison:
    key, shared, rank, q_rank, value = 6, 4, 10, 14, 5
    config = KimiLinearConfig(
        hidden_size=DIM,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=q_rank,
        kv_lora_rank=rank,
        qk_nope_head_dim=key,
        qk_rope_head_dim=shared,
        v_head_dim=value,
    )
    config._attn_implementation = "eager"
    names = {
        "q.0.weight": "q_a_proj.weight",
        "q.1.weight": "q_a_layernorm.weight",
        "q.2.weight": "q_b_proj.weight",
        "down.weight": "kv_a_proj_with_mqa.weight",
        "norm.weight": "kv_a_layernorm.weight",
        "up.weight": "kv_b_proj.weight",
        "output.weight": "o_proj.weight",
    }
    sizes = {"head_dim": key, "value_dim": value, "rope_dim": shared, "rank": rank, "q_rank": q_rank}
    ours = mixer_spec("mla", rotate=False, **sizes).build(replace(CONTEXT, norm_eps=1e-6))
    return Comparison(
        theirs=KimiLinearAttention(config, layer_idx=0),
        ours=ours,
        rename=lambda w: {name: w[their] for name, their in names.items()},
        call=lambda layer, x: layer(x, causal_mask(x))[0],
    )


def ling3() -> Comparison:
    config = BailingHybridConfig(
        hidden_size=DIM,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=HEADS,
        linear_head_dim=8,
        rms_norm_eps=CONTEXT.norm_eps,
        kda_safe_gate=True,
        kda_lower_bound=-5.0,
    )

    def rename(w: Weights) -> Weights:
        return {
            "project.linear.weight": torch.cat([w[f"{name}_proj.weight"] for name in "qkvg"]),
            "conv.weight": w["conv1d.weight"].squeeze(1),
            "rule.beta.weight": w["b_proj.weight"],
            "rule.steps.project.weight": w["forget_gate.f_proj.weight"],
            "rule.steps.A_log": w["forget_gate.A_log"],
            "rule.steps.dt_bias": w["forget_gate.dt_bias"],
            "norm.weight": w["o_norm.weight"],
            "output.weight": w["o_proj.weight"],
        }

    ours = mixer_spec("kda", head_dim=8, gate_lower_bound=-5.0, full_rank="both").build(CONTEXT)
    return Comparison(theirs=BailingHybridDeltaAttention(config, layer_idx=0), ours=ours, rename=rename)


def nemotron_h(kind: str) -> Comparison:
    """A layer of Nemotron-H: its Mamba-2, whose norm is over a group, or its attention without positions.

    Theirs also keeps dt above 0.001. Ours has no such limit, so here it is 0.
    """
    G, state, inner = 2, 8, 2 * DIM
    config = NemotronHConfig(
        hidden_size=DIM,
        layer_types=[kind],
        mamba_num_heads=HEADS,
        mamba_head_dim=inner // HEADS,
        ssm_state_size=state,
        n_groups=G,
        chunk_size=32,
        time_step_min=0.0,
        layer_norm_epsilon=CONTEXT.norm_eps,
        num_attention_heads=HEADS,
        num_key_value_heads=G,
        head_dim=8,
    )
    config._attn_implementation = "eager"
    if kind == "linear_attention":
        ours = mixer_spec("mamba2", state=state, groups=G).build(CONTEXT)
        mamba = NemotronHMamba2Mixer(config, layer_idx=0)
        return Comparison(theirs=mamba, ours=ours, rename=of_mamba2(G, state, inner))

    def rename(w: Weights) -> Weights:
        rows = torch.cat([w[f"{name}_proj.weight"] for name in "qkv"])
        return {"project.linear.weight": rows, "output.weight": w["o_proj.weight"]}

    ours = mixer_spec("softmax", head_dim=8, rope_fraction=0.0).build(replace(CONTEXT, kv_heads=G))
    theirs = NemotronHAttention(config, layer_idx=0)
    return Comparison(theirs=theirs, ours=ours, rename=rename, call=lambda layer, x: layer(x, causal_mask(x))[0])


def of_mamba2(G: int, state: int, inner: int) -> Callable[[Weights], Weights]:
    def rename(w: Weights) -> Weights:
        # Theirs lie in the order z, x, B, C, dt; ours in the order C (q), B (k), x (v), z.
        sizes = [inner, G * state, G * state]
        z, x, B, C, dt = w["in_proj.weight"].split([inner, *sizes, HEADS])
        return {
            "project.linear.weight": torch.cat([C, B, x, z]),
            "conv.weight": torch.cat(w["conv1d.weight"].squeeze(1).split(sizes)[::-1]),
            "conv.bias": torch.cat(w["conv1d.bias"].split(sizes)[::-1]),
            "rule.steps.project.weight": dt,
            "rule.steps.A_log": w["A_log"],
            "rule.steps.dt_bias": w["dt_bias"],
            "rule.D": w["D"],
            "norm.weight": w["norm.weight"],
            "output.weight": w["out_proj.weight"],
        }

    return rename


def mamba2() -> Comparison:
    G, state, inner = 2, 8, 2 * DIM
    config = Mamba2Config(
        hidden_size=DIM,
        num_hidden_layers=1,
        num_heads=HEADS,
        head_dim=inner // HEADS,
        state_size=state,
        n_groups=G,
        chunk_size=32,
        layer_norm_epsilon=CONTEXT.norm_eps,
    )

    ours = mixer_spec("mamba2", state=state, groups=G).build(CONTEXT)
    return Comparison(theirs=Mamba2Mixer(config, layer_idx=0), ours=ours, rename=of_mamba2(G, state, inner))


class MiniMaxRule(nn.Module):
    """What MiniMax has in place of our lightning mixer's rule: ALiBi's slopes, and values with SiLU too."""

    def __init__(self, slopes_H: Tensor) -> None:
        super().__init__()
        self.slopes_H = slopes_H

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> RecurrenceInputs:
        return RecurrenceInputs(F.silu(q), F.silu(k), F.silu(v), -self.slopes_H)


def minimax() -> Comparison:
    width = DIM // HEADS
    config = MiniMaxConfig(
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        head_dim=width,
        block_size=32,
        layer_types=["linear_attention"] * 2,
    )
    theirs = MiniMaxLightningAttention(config, layer_idx=1)

    def rename(w: Weights) -> Weights:
        # Theirs are cut into heads first; ours into q, k and v first.
        q, k, v = (rows.flatten(0, 1) for rows in w["qkv_proj.weight"].unflatten(0, (HEADS, 3, width)).unbind(1))
        return {
            "project.linear.weight": torch.cat([q, k, v, w["output_gate.weight"]]),
            "norm.weight": w["norm.weight"],
            "output.weight": w["out_proj.weight"],
        }

    shape = MixerShape(heads=HEADS, key=width, value=width, decay="fixed", scale=1.0, gate=torch.sigmoid, norm="all")
    context = BlockContext(**{**vars(CONTEXT), "norm_eps": theirs.norm.variance_epsilon})
    ours = RecurrentMixer(shape, context, MiniMaxRule(theirs.slope_rate.flatten().double()))
    return Comparison(theirs=theirs, ours=ours, rename=rename, call=lambda layer, x: layer(x, None, None)[0])


def lfm2() -> Comparison:
    config = Lfm2Config(hidden_size=DIM, num_hidden_layers=1, conv_L_cache=3, layer_types=["conv"])

    def rename(w: Weights) -> Weights:
        return {
            "project.weight": w["in_proj.weight"],
            "conv.weight": w["conv.weight"].squeeze(1),
            "output.weight": w["out_proj.weight"],
        }

    ours = mixer_spec("short_conv").build(CONTEXT)
    return Comparison(theirs=Lfm2ShortConv(config, layer_idx=0), ours=ours, rename=rename)


def errors_of(comparison: Comparison) -> dict[str, float]:
    theirs, ours = comparison.theirs.double(), comparison.ours.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            # Slow decays, so that what a state carries from one chunk to the next counts.
            weight.copy_(0.5 * noise - 4 if name.endswith("dt_bias") else 0.5 * noise + ("norm" in name))
    ours.load_state_dict((comparison.load or comparison.rename)(dict(theirs.named_parameters())))
    assert sum(w.numel() for w in ours.parameters()) == sum(w.numel() for w in theirs.parameters())

    errors = {}
    for form, batch, documents in (("batch", 2, (0, TOKENS)), ("packed", 1, DOCUMENTS)):
        x = torch.randn(batch, TOKENS, DIM, generator=generator, dtype=torch.float64).requires_grad_()
        dy = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        shard = hsp.SequenceParallel(None).shard(TOKENS, documents if form == "packed" else None)
        parts = [x[:, a:b] for a, b in zip(documents, documents[1:], strict=False)]
        pairs = {
            "theirs": (theirs, torch.cat([comparison.call(theirs, part) for part in parts], dim=1)),
            "ours": (ours, ours(x, shard)[0]),
        }
        got = {}
        for whose, (layer, y) in pairs.items():
            names, weights = zip(*layer.named_parameters(), strict=True)
            dx, *gradients = torch.autograd.grad(y, [x, *weights], dy)
            of_weights = dict(zip(names, gradients, strict=True))
            of_weights = comparison.rename(of_weights) if whose == "theirs" else of_weights
            got[whose] = {"y": y, "dx": dx} | {f"d {name}": gradient for name, gradient in of_weights.items()}
        for name, value in got["ours"].items():
            errors[f"{form} {name}"] = relative(value, got["theirs"][name])
    return errors


def main() -> None:
    models = {
        "Qwen3-Next": qwen3_next,
        "Qwen3-Next attention": qwen3_next_attention,
        "Qwen3-Next attention by YaRN": partial(qwen3_next_attention, RopeScaling(factor=4.0, original_length=TOKENS)),
        "Kimi Linear": kimi_linear,
        "Kimi Linear attention": kimi_linear_attention,
        "Ling 3": ling3,
        "Nemotron-H": partial(nemotron_h, "linear_attention"),
        "Nemotron-H attention": partial(nemotron_h, "full_attention"),
        "Mamba-2": mamba2,
        "MiniMax": minimax,
        "LFM2": lfm2,
    }
    errors: Errors = {name: errors_of(build()) for name, build in models.items()}
    report(errors)


if __name__ == "__main__":
    main()
