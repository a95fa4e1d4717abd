"""Patterns in words: counts, groups, a tail that the depth cuts, options of one layer, and blocks of one part."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from layers.config import ModelConfig, block_specs, expand_pattern, model_facts, parameters_by_kind, pattern_letters
from layers.model import HybridLM
from layers.moe import MoEConfig
from tests.support.oracle import assert_close

TINY: dict[str, Any] = {"vocab": 16, "dim": 16, "heads": 2, "mlp_dim": 8}


@pytest.mark.parametrize(
    ("pattern", "depth", "names"),
    [
        ("3*gla softmax", 8, ["gla", "gla", "gla", "softmax"] * 2),
        ("gla", 2, ["gla", "gla"]),
        (["3*gla", "softmax"], 4, ["gla", "gla", "gla", "softmax"]),
        ("2*(2*gla softmax) kda", 7, ["gla", "gla", "softmax", "gla", "gla", "softmax", "kda"]),
        ("2*(2*(gla kda) softmax)", 10, [*["gla", "kda"] * 2, "softmax"] * 2),
        ("gla softmax ...", 5, ["gla", "softmax", "gla", "softmax", "gla"]),
        ("6*gla softmax ...", 3, ["gla", "gla", "gla"]),
        (["gla", "softmax", "..."], 3, ["gla", "softmax", "gla"]),
        ("LLN...", 5, ["lightning", "lightning", "softmax", "lightning", "lightning"]),
        ("M-*E", 4, ["mamba2/none", "none/mlp", "softmax/none", "none/moe"]),
        ("mamba2+softmax", 2, ["mamba2+softmax"] * 2),
        ("gla/mlp 2*gla+softmax/none none", 4, ["gla/mlp", *["gla+softmax/none"] * 2, "none"]),
        ([{"2*gla": {"expand_k": 1.0}}, "softmax"], 3, ["gla", "gla", "softmax"]),
    ],
)
def test_words_of_a_pattern(pattern: Any, depth: int, names: list[str]) -> None:
    assert expand_pattern(ModelConfig(pattern=pattern, depth=depth)) == tuple(names)


def test_letters_of_words() -> None:
    assert pattern_letters(["gla", "softmax", "mamba2+softmax/none", "gla+kda", "none/mlp", "kda/moe"]) == "LNNL-L"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "2*gla softmax",
            "pattern LLN is a tile of 3 blocks, which does not tile a depth of 8; change it, or set depth",
        ),
        ("2*gla softmax", "to 6 or 9; a last word ... lets the depth cut the tile"),
        ("...", "pattern is empty"),
        (["...", "gla"], "unknown mixer in pattern '...'"),
        ("3*glaa softmax", "unknown mixer in pattern 'glaa'; did you mean 'gla'?"),
        ("2*(gla softmax", "unknown mixer in pattern '(gla'"),
        ("0*gla", "pattern has 0*, which must be a count from 1 to 100,000"),
        ("999999*gla", "pattern has 999999*, which must be a count"),
        ("99999*(gla softmax)", "pattern has 99999*(gla softmax), more words than 100,000 letters"),
        ("gla/mpl", "unknown feed-forward in pattern 'mpl'; did you mean 'mlp'?"),
        ("nothing/mlp", "unknown mixer in pattern 'nothing'"),
        ("none/none", "a block of nothing"),
        ("gla+gla", "the same mixer twice"),
        ("gla/moe", "pattern has gla/moe, and the model has no moe; set model.moe"),
        ("E", "pattern has none/moe, and the model has no moe"),
        (["E"], "unknown mixer in pattern 'E'"),
        ([{"gla+softmax": {"expand_k": 1.0}}], "they are {MIXER: {OPTION: VALUE}} for one mixer"),
        ([{"gla": 3}], "pattern has options 3 for gla"),
        ([{"gla": {"expand": 1.0}}], "unknown option 'expand' of mixer 'gla'"),
        ([{"gla": {}, "kda": {}}], "unknown mixer in pattern"),
    ],
)
def test_errors_say_what_to_change(pattern: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        model_facts(ModelConfig(pattern=pattern))


def test_options_of_one_layer_come_before_those_of_the_model() -> None:
    pattern = ["gla", {"gla": {"expand_k": 2.0}}, {"gla": {"gate_rank": 3}}]
    config = ModelConfig(pattern=pattern, depth=3, mixers={"gla": {"expand_k": 1.0}})
    specs = [spec.mixer for spec in block_specs(config)]
    assert [(spec.expand_k, spec.gate_rank) for spec in specs] == [(1.0, 16), (2.0, 16), (1.0, 3)]  # type: ignore[union-attr]


def test_a_pattern_of_words_and_options_is_a_recipes_value() -> None:
    recipe = OmegaConf.create("{pattern: [2*gla, {gla: {expand_k: 1.0}}, softmax, ...], depth: 4, moe: {experts: 4}}")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), recipe))
    want = ModelConfig(
        pattern=["2*gla", {"gla": {"expand_k": 1.0}}, "softmax", "..."], depth=4, moe=MoEConfig(experts=4)
    )
    assert config == want and expand_pattern(config) == ("gla", "gla", "gla", "softmax")


def test_blocks_of_one_part_have_that_part_alone() -> None:
    """The stream after blocks of a mixer and of an MLP is that of one block of both; decoding counts every token."""
    both = HybridLM(ModelConfig(pattern="gla softmax", depth=2, **TINY)).double()
    parts = HybridLM(ModelConfig(pattern="gla/none none/mlp softmax/none none", depth=4, **TINY)).double()
    names = {"blocks.0.mixer": 0, "blocks.0.mlp": 1, "blocks.1.mixer": 2, "blocks.1.mlp": 3}
    for name, weight in both.state_dict().items():
        place = next((number for prefix, number in names.items() if name.startswith(prefix)), None)
        own = name if place is None else re.sub(r"blocks\.\d", f"blocks.{place}", name)
        parts.state_dict()[own].copy_(weight)
    assert len(parts.state_dict()) == len(both.state_dict())
    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_close("logits", parts(tokens), both(tokens), 1e-14)
    logits, cache = parts.prefill(tokens[:, :4])
    for t in range(4, 9):
        logits, cache = parts.step(tokens[:, t], cache)
    assert_close("decoding", logits, both(tokens)[:, -1], 1e-10)
    assert [layer.position for layer in cache] == [9] * 4


def test_an_unknown_mlp_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown mlp 'relu'; did you mean 'relu2'\\? known: relu2, swiglu"):
        model_facts(ModelConfig(mlp="relu"))  # type: ignore[arg-type]


def test_squared_relu_by_hand() -> None:
    block = HybridLM(ModelConfig(pattern="none", depth=1, mlp="relu2", **TINY)).blocks[0]
    x = torch.randn(1, 3, 16)
    assert block.mlp is not None
    first, second = (weight.T for weight in block.mlp.parameters())
    assert_close("y", block.mlp(x), (x @ first).clamp(min=0) ** 2 @ second, 1e-6)


def test_parameters_by_kind_and_what_is_counted() -> None:
    config = ModelConfig(
        pattern="gla/mlp gla+softmax softmax/none none", depth=4, side_by_side="mean",
        moe=MoEConfig(experts=3, dim=5, shared=6, shared_gate=True), **TINY,
    )  # fmt: skip
    model = HybridLM(config)
    kinds = parameters_by_kind(config)
    both = model.blocks[1].mixer.mixers
    parts = {"embedding": [model.embedding], "head": [model.head], "gla": [model.blocks[0].mixer, both["gla"]]}
    parts |= {"softmax": [model.blocks[2].mixer, both["softmax"]], "mlp": [model.blocks[0].mlp]}
    parts |= {"experts": [model.blocks[1].mlp, model.blocks[3].mlp]}
    for kind, modules in parts.items():
        assert kinds.pop(kind) == sum(p.numel() for module in modules for p in module.parameters()), kind
    assert kinds == {"norms": 16 * (7 + 2)}
    facts = model_facts(config)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.parameters - facts.active_parameters == 2 * (3 * 16 * 5)  # one idle expert in each of two blocks
    tied = ModelConfig(tie_embeddings=True, **TINY)
    assert "head" not in parameters_by_kind(tied)
    assert sum(parameters_by_kind(tied).values()) == model_facts(tied).parameters


def test_a_model_on_the_meta_device_draws_no_number_and_becomes_real() -> None:
    config = ModelConfig(
        pattern="gla mamba2+softmax gated_delta_net rwkv6 hgrn2 lightning kda",
        depth=7,
        moe=MoEConfig(bias_rate=0.1),
        **TINY,
    )
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = HybridLM(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    want = HybridLM(config)
    assert {name: w.shape for name, w in model.state_dict().items()} == {
        n: w.shape for n, w in want.state_dict().items()
    }
    model.to_empty(device="cpu")
    for weight in model.state_dict().values():
        weight.fill_(float("nan"))
    model.init_weights(seed=0)
    for name, weight in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens), want(tokens))


def test_a_model_that_fits_no_machine_has_a_skeleton() -> None:
    moe = MoEConfig(experts=512, dim=8192)
    with torch.device("meta"):
        huge = HybridLM(ModelConfig(vocab=100_000, dim=8192, depth=4, heads=64, pattern="kda softmax", moe=moe))
    assert sum(p.numel() for p in huge.parameters()) > 4e11
