"""ModelConfig: the pattern it expands to, every error, and the cost that follows from it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from layers.config import (
    ModelConfig,
    block_specs,
    expand_pattern,
    mixer_specs,
    mlp_width,
    model_facts,
    pattern_letters,
)
from layers.model import HybridLM
from layers.registry import MIXERS, mixer_cost
from layers.rotary import RopeScaling


def scaling(**options: Any) -> RopeScaling:
    return RopeScaling(**{"factor": 4.0, "original_length": 8, **options})


@pytest.mark.parametrize(
    ("options", "letters"),
    [
        ({}, "LLLNLLLN"),
        ({"ratio": "0"}, "LLLLLLLL"),
        ({"ratio": "1"}, "NNNNNNNN"),
        ({"ratio": "1/8"}, "LLLLLLLN"),
        ({"ratio": "1/2"}, "LNLNLNLN"),
        ({"ratio": "2/4"}, "LNLNLNLN"),
        ({"ratio": "0.25"}, "LLLNLLLN"),
        ({"ratio": "3/4"}, "LNNNLNNN"),
        ({"ratio": "2/5", "depth": 5}, "LLNLN"),
        ({"pattern": "LLLN"}, "LLLNLLLN"),
        ({"pattern": "NL", "ratio": "1/3"}, "NLNLNLNL"),
        ({"pattern": ["gla", "softmax", "linear", "retention"]}, "LNLLLNLL"),
    ],
)
def test_letters_of_the_pattern(options: dict[str, Any], letters: str) -> None:
    assert pattern_letters(expand_pattern(ModelConfig(**options))) == letters


def test_mixers_of_the_pattern() -> None:
    assert expand_pattern(ModelConfig(linear="gla", ratio="1/2", depth=4)) == ("gla", "softmax") * 2
    assert expand_pattern(ModelConfig(linear="gla", pattern="LN", depth=4)) == ("gla", "softmax") * 2
    names = ("gla", "softmax", "linear")
    assert expand_pattern(ModelConfig(pattern=list(names), depth=6)) == names * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ratio": "1/3"},
            "ratio 1/3 is a tile of 3 blocks, which does not tile a depth of 8; the nearest ratio that does is 3/8",
        ),
        ({"ratio": "1/3"}, "set depth to 6 or 9"),
        ({"ratio": "1/16", "depth": 4}, "the nearest ratio that does is 1/4, or set depth to 16"),
        (
            {"ratio": "0.333"},
            "ratio 0.333 is a tile of 1000 blocks, which does not tile a depth of 8; the nearest ratio",
        ),
        ({"ratio": "0.333", "depth": 9}, "the nearest ratio that does is 1/3, or set depth to 1000"),
        ({"ratio": "0.9", "depth": 1}, "the nearest ratio that does is 1, or set depth to 10"),
        ({"ratio": "0.3333333333333"}, "the nearest ratio that does is 3/8, or set depth to 10000000000000"),
        (
            {"ratio": "3:1"},
            "ratio '3:1' is not a fraction; 3 linear blocks for 1 of softmax attention are a ratio of 1/4",
        ),
        ({"ratio": "6:2"}, "are a ratio of 1/4"),
        (
            {"pattern": "LLN"},
            "pattern LLN is a tile of 3 blocks, which does not tile a depth of 8; change it, or set depth",
        ),
        ({"pattern": ["gla"] * 9}, "pattern LLLLLLLLL is a tile of 9 blocks, which does not tile a depth of 8"),
        ({"ratio": "5/4"}, "ratio 5/4 is not a share of blocks; it must be between 0 and 1"),
        ({"ratio": "-1/4"}, "must be between 0 and 1"),
        ({"ratio": "1/0"}, "ratio '1/0' is not a fraction such as 1/4, 0 or 1"),
        ({"ratio": "one"}, "ratio 'one' is not a fraction"),
        ({"pattern": ""}, "pattern is empty"),
        ({"pattern": []}, "pattern is empty"),
        ({"pattern": "LLLM"}, "pattern 'LLLM' has letters other than L (linear) and N (softmax)"),
        ({"pattern": "LLLM"}, "mixers are named in full, as in `3*gla softmax`"),
        ({"pattern": ["gla", "N"]}, "unknown mixer in pattern 'N'; known: "),
        ({"pattern": ["glaa"]}, "unknown mixer in pattern 'glaa'; did you mean 'gla'?"),
        ({"pattern": [["gla"]]}, "unknown mixer in pattern"),
        ({"pattern": 3}, "pattern 3 is neither letters"),
        ({"linear": "lightening"}, "unknown linear mixer 'lightening'; did you mean 'lightning'?"),
        ({"linear": "softmax"}, "unknown linear mixer 'softmax'; known: "),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"heads": 0}, "heads is 0"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"mlp_dim": 0}, "mlp_dim is 0"),
        ({"vocab": -1}, "vocab is -1"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be greater than 0"),
        ({"rope_base": -1.0}, "rope_base is -1.0; it must be greater than 0"),
        ({"rope_scaling": scaling(factor=0.5)}, "rope_scaling.factor is 0.5; it must be at least 1"),
        ({"rope_scaling": scaling(original_length=0)}, "rope_scaling.original_length is 0; it must be at least 1"),
        ({"rope_scaling": scaling(beta_slow=40.0)}, "rope_scaling.beta_slow 40.0 and beta_fast 32.0 must rise from 0"),
        ({"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3; change one of them"),
        ({"dim": 130}, "dim 130 with expand 1 is 130 channels, which 4 heads cannot share evenly"),
        ({"dim": 36}, "gives each of 4 heads 9 channels, which rotary embedding cannot pair"),
        ({"mixers": {"glaa": {}}}, "unknown mixer 'glaa'; did you mean 'gla'?"),
        ({"mixers": {"gla": {"expand": 1.0}}}, "unknown option 'expand' of mixer 'gla'"),
        (
            {"linear": "gated_delta_net", "mixers": {"gated_delta_net": {"key_heads": 3}}},
            "heads 4 is not a multiple of key_heads 3; change one of them",
        ),
        (
            {"linear": "mamba2", "mixers": {"mamba2": {"groups": 8}}},
            "heads 4 is not a multiple of groups 8; change one of them",
        ),
        ({"mixers": {"gla": {"expand_k": 0.3}}, "linear": "gla"}, "dim 128 with expand_k 0.3 is 38.4 channels"),
    ],
)
def test_errors_say_what_to_change(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        model_facts(ModelConfig(**options))
    with pytest.raises(ValueError, match=re.escape(message)):
        HybridLM(ModelConfig(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": "0." + "3" * 900},
        {"ratio": "3" * 900},
        {"ratio": "three " * 900},
        {"pattern": "LLN" * 900},
        {"pattern": "LLX" * 900},
        {"pattern": ["gla"] * 900},
    ],
)
def test_errors_are_short_however_long_the_pattern_is(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        expand_pattern(ModelConfig(**options))
    assert len(str(caught.value)) < 300


def test_options_reach_the_blocks() -> None:
    config = ModelConfig(pattern=["gla", "softmax"], depth=4, kv_heads=2, mixers={"gla": {"expand_k": 1.0}})
    specs, contexts, _ = zip(*block_specs(config), strict=True)
    assert [getattr(spec, "expand_k", None) for spec in specs] == [1.0, None] * 2
    assert [(context.layer, context.depth, context.kv_heads) for context in contexts] == [
        (layer, 4, 2) for layer in range(4)
    ]
    assert ModelConfig().kv_heads is None and block_specs(ModelConfig())[0][1].kv_heads == 4


@pytest.mark.parametrize("mixer", ["softmax", "sliding_window", "mla"])
def test_scaled_positions_reach_softmax_attention_and_decoding(mixer: str) -> None:
    config = ModelConfig(dim=16, depth=1, heads=2, pattern=[mixer], rope_scaling=scaling())
    text = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    model = HybridLM(config).double()
    logits = model(text)
    assert not torch.allclose(logits, HybridLM(replace(config, rope_scaling=None)).double()(text))
    _, cache = model.prefill(text[:, :-1])
    got, _ = model.step(text[:, -1], cache)
    assert torch.allclose(got, logits[:, -1], atol=1e-12)


def test_scaled_positions_of_a_recipe() -> None:
    schema = OmegaConf.structured(ModelConfig)
    recipe = OmegaConf.create("{rope_scaling: {factor: 4, original_length: 512}}")
    config = OmegaConf.to_object(OmegaConf.merge(schema, recipe))
    assert config.rope_scaling == RopeScaling(factor=4.0, original_length=512)


def test_mlp_width() -> None:
    assert mlp_width(ModelConfig(dim=128)) == 352  # 8/3 of 128 is 341.3
    assert mlp_width(ModelConfig(dim=96)) == 256
    assert mlp_width(ModelConfig(dim=128, mlp_dim=100)) == 100


def test_config_is_a_structured_omegaconf_config() -> None:
    schema = OmegaConf.structured(ModelConfig)
    recipe = OmegaConf.create("{ratio: 0, kv_heads: 2, pattern: [gla, softmax], mixers: {gla: {expand_k: 1}}}")
    config = OmegaConf.to_object(OmegaConf.merge(schema, recipe))
    want = ModelConfig(ratio="0", kv_heads=2, pattern=["gla", "softmax"], mixers={"gla": {"expand_k": 1}})
    assert config == want
    assert OmegaConf.to_object(schema) == ModelConfig()


@pytest.mark.parametrize("tied", [False, True])
def test_facts_of_the_model_are_what_is_counted(tied: bool) -> None:
    config = ModelConfig(
        vocab=50,
        dim=32,
        depth=len(MIXERS),
        heads=4,
        kv_heads=2,
        pattern=sorted(MIXERS),
        tie_embeddings=tied,
        mixers={"sliding_window": {"window": 4}},
    )
    model, facts = HybridLM(config), model_facts(config)
    assert facts.parameters == sum(weight.numel() for weight in model.parameters())

    cache = model.init_cache(2)
    for _ in range(9):
        _, cache = model.step(torch.zeros(2, dtype=torch.long), cache)
    held = sum(tensor.nbytes for layer in cache for tensor in layer.tensors)
    assert facts.state_bytes(batch=2, length=9) == held

    # What the blocks' own test leaves: the MLPs and the head, counted on a model whose mixers are only their facts.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(torch.stack([block.mlp(torch.zeros(1, 9, 32)) for block in model.blocks]).sum(0))
    mixers = sum(mixer_cost(spec, context).flops(9) for _, spec, context in mixer_specs(config))
    assert facts.flops(9) == counter.get_total_flops() + mixers


def test_facts_are_had_without_memory_and_without_random_numbers() -> None:
    before = torch.get_rng_state()
    facts = model_facts(ModelConfig(vocab=100_000, dim=8192, depth=len(MIXERS), heads=64, pattern=sorted(MIXERS)))
    assert facts.parameters > 1e10
    assert torch.equal(torch.get_rng_state(), before)
