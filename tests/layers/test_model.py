"""HybridLM: what it computes, decoding, its loss, its initial weights and its dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.config import ModelConfig, model_facts
from layers.model import HybridLM
from tests.support.oracle import assert_close, relative

CONFIG = ModelConfig(
    vocab=32,
    dim=32,
    depth=5,
    heads=4,
    kv_heads=2,
    pattern=["linear", "lightning", "retention", "gla", "softmax"],
)
CONFIGS = [
    CONFIG,
    replace(CONFIG, pattern=["delta_net", "gated_delta_net", "kda", "mamba2", "softmax"]),
    replace(
        CONFIG,
        pattern=["gated_delta_product", "comba", "short_conv", "mla", "softmax"],
        mixers={"softmax": {"conv": 3, "qk_norm": True, "rope_fraction": 0.5, "gate": "head", "sinks": True}},
    ),
    replace(CONFIG, pattern=["rwkv6", "hgrn2", "based", "rebased", "sliding_window"]),
]

every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.pattern[0])


def sequences(batch: int = 2, length: int = 21) -> Tensor:
    return torch.randint(CONFIG.vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt()


@every_config
def test_logits_by_hand(config: ModelConfig) -> None:
    model = HybridLM(config).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    tokens = sequences()
    x = model.embedding.weight[tokens]
    for block in model.blocks:
        mixed, _ = block.mixer(rms_norm(x, block.mixer_norm.weight))
        x = x + mixed
        gate, up = (rms_norm(x, block.mlp_norm.weight) @ block.mlp.input.weight.T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ block.mlp.output.weight.T
    want = rms_norm(x, model.norm.weight) @ model.head.weight.T
    assert_close("logits", model(tokens), want, 1e-12)


@every_config
def test_decoding_is_the_parallel_forward(config: ModelConfig) -> None:
    model = HybridLM(config).double()
    tokens = sequences()
    want = model(tokens)
    cache = start = model.init_cache(2)
    for t in range(21):
        got, cache = model.step(tokens[:, t], cache)
        assert_close(f"token {t}", got, want[:, t], 1e-10)
    again, _ = model.step(tokens[:, 0], start)
    assert_close("the cache given stays as it is", again, want[:, 0], 1e-10)


@every_config
@pytest.mark.parametrize("length", [1, 2, 20])
def test_a_prompt_read_at_once_is_read_token_by_token(config: ModelConfig, length: int) -> None:
    """Shorter than a convolution, and longer than a window; what is kept of it is the same too."""
    model = HybridLM(replace(config, mixers={"sliding_window": {"window": 5}})).double()
    tokens = sequences()
    want_cache = model.init_cache(2)
    for t in range(length):
        want, want_cache = model.step(tokens[:, t], want_cache)
    got, cache = model.prefill(tokens[:, :length])
    assert_close("logits", got, want, 1e-10)
    for layer, (one, other) in enumerate(zip(cache, want_cache, strict=True)):
        assert one.position == other.position == length
        for kept, kept_by_steps in zip(one.tensors, other.tensors, strict=True):
            assert_close(f"block {layer}", kept, kept_by_steps, 1e-10)
    got, _ = model.step(tokens[:, length], cache)
    assert_close("the token after it", got, model(tokens)[:, length], 1e-10)


def test_several_tokens_after_others_are_refused_by_softmax_attention() -> None:
    mixer = HybridLM(CONFIG).blocks[-1].mixer
    _, cache = mixer(torch.zeros(1, 3, 32), cache=mixer.init_cache(1))
    with pytest.raises(ValueError, match="got 2 tokens and a cache that has read some"):
        mixer(torch.zeros(1, 2, 32), cache=cache)


@every_config
def test_a_token_changes_no_logits_before_it(config: ModelConfig) -> None:
    model = HybridLM(config)
    tokens = sequences()
    changed = tokens.clone()
    changed[:, 13] = (tokens[:, 13] + 1) % CONFIG.vocab
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert (before[:, 13:] != after[:, 13:]).any(dim=-1).all()


@every_config
def test_loss_and_gradients_are_those_of_the_logits(config: ModelConfig) -> None:
    tokens, labels = sequences(), sequences().roll(-1, 1)
    labels[:, -1] = -100
    model = HybridLM(config).double()
    loss, valid = model.loss(tokens, labels)
    loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    plain = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    plain.backward()
    assert valid.item() == 40
    assert_close("loss", loss, plain, 1e-12)
    for name, weight in model.named_parameters():
        assert_close(name, grads[name], weight.grad, 1e-10)


NOT_DRAWN = (
    ".sinks",
    ".feedback",
    ".correction",
    ".bias",
    ".D",
    ".mix",
    ".mix_first",
    ".decay",
    ".bonus",
    "_down",
    ".gamma",
    ".beta",
    ".bound",
)


@every_config
def test_weights_depend_on_the_seed_alone(config: ModelConfig) -> None:
    torch.manual_seed(1)
    first = HybridLM(config)
    torch.manual_seed(2)
    second = HybridLM(config).double()
    third = HybridLM(config)
    third.init_weights(seed=7)
    for (name, weight), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(weight.double(), other), name
    second.float().init_weights(seed=7)
    for (name, weight), other in zip(third.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, other), name
        if "norm" not in name and not name.endswith(NOT_DRAWN):
            assert not torch.equal(weight, first.get_parameter(name)), name


def test_modules_of_torch_do_not_draw_by_themselves() -> None:
    """They have a method of the same name, which takes no generator and draws from the global one."""
    model = HybridLM(CONFIG)
    strangers = nn.ModuleList([nn.LayerNorm(3), nn.Conv1d(2, 2, 3)])
    model.blocks[0].mixer.strangers = strangers
    with torch.no_grad():
        for weight in strangers.parameters():
            weight.fill_(7.0)
    before = torch.get_rng_state()
    model.init_weights(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all((weight == 7).all() for weight in strangers.parameters())


def test_initial_weights_have_the_variance_they_should() -> None:
    model = HybridLM(ModelConfig(dim=128, depth=4))
    block = model.blocks[0]
    for weight, variance in [
        (model.embedding.weight, 1 / 128),
        (model.head.weight, 1 / 128),
        (block.mixer.project.linear.weight, 1 / 128),
        (block.mixer.output.weight, 1 / 128 / 8),
        (block.mlp.output.weight, 1 / block.mlp.output.in_features / 8),
    ]:
        assert weight.var().item() == pytest.approx(variance, rel=0.05)
    assert torch.equal(block.mlp_norm.weight, torch.ones(128))
    # Every word about equally likely: the loss starts near ln(vocab), a little above for unit logits.
    loss, valid = model.loss(torch.randint(256, (4, 64)), torch.randint(256, (4, 64)))
    assert 5.5 < (loss / valid).item() < 6.6


def test_time_steps_and_their_rates_begin_in_the_range_of_the_paper() -> None:
    """Mamba-2 begins with steps of 0.001 to 0.1, log-uniform, and rates of 1 to 16, uniform; the rest has no bias."""
    model = HybridLM(ModelConfig(dim=512, depth=2, heads=512, linear="mamba2", ratio="0"))
    for block in model.blocks:
        rule = block.mixer.get_submodule("rule")
        steps = torch.log10(F.softplus(rule.steps.dt_bias))
        assert -3.001 < steps.min() < -2.9 and -1.02 < steps.max() < -0.999
        assert steps.mean().item() == pytest.approx(-2, abs=0.1)
        rates = rule.steps.A_log.exp()
        assert 0.999 < rates.min() < 1.5 and 15.5 < rates.max() < 16.001
        assert rates.mean().item() == pytest.approx(8.5, abs=0.6)
        assert torch.equal(rule.D, torch.ones(512))
        conv = block.mixer.get_submodule("conv")
        assert conv.weight.abs().max() <= 0.5 and conv.weight.var().item() == pytest.approx(1 / 12, rel=0.1)
        assert not conv.bias.any()
    assert not torch.equal(*(block.mixer.rule.steps.A_log for block in model.blocks))


def test_rwkv6_begins_as_its_authors_have_it() -> None:
    """By channel n of D in block l of 5: decays from exp(-exp(-6)) to exp(-exp(-1)), a bonus that falls in deep blocks
    alone and zigzags, mixing that fades with the channel, and no low-rank part yet."""
    model = HybridLM(replace(CONFIG, pattern=["rwkv6"]))
    for layer, block in enumerate(model.blocks):
        mixer, late = block.mixer, layer / 4
        assert mixer.decay[[0, -1]].tolist() == pytest.approx([-6.0, -1.0])
        assert mixer.decay[16].item() == pytest.approx(-6 + 5 * (16 / 31) ** (0.7 + 1.3 * late))
        bonus = mixer.bonus[[0, 1, 2, 31]].tolist()
        assert bonus == pytest.approx([late, late * 30 / 31 + 0.1, late * 29 / 31 - 0.1, 0.1], abs=1e-6)
        share = 0.5 ** (1 - layer / 5)  # channel 16 of 32
        assert mixer.mix_first[16].item() == pytest.approx(1 - share)
        want = [1 - share, 1 - share, 1 - share - 0.3 * late, 1 - share**0.5, 1 - share**0.5]  # w, k, v, r, g
        assert mixer.mix[16::32].tolist() == pytest.approx(want)
        assert not mixer.mix_down.any() and not mixer.decay_down.any()
        for up in (mixer.mix_up, mixer.decay_up):
            assert 0.009 < up.abs().max() <= 0.01 and abs(up.mean().item()) < 1e-3


def test_lower_bounds_of_hgrn2_begin_evenly_over_the_depth() -> None:
    config = replace(CONFIG, pattern=["hgrn2"])
    model = HybridLM(config)
    assert model_facts(config).parameters == sum(weight.numel() for weight in model.parameters())
    assert model.blocks[0].mixer.rule.bound is None
    for layer, block in enumerate(model.blocks[1:], start=1):
        bound = torch.sigmoid(block.mixer.rule.bound)
        assert_close(f"block {layer}", bound, torch.full((32,), layer / 5), 1e-6)


def test_tied_head_is_the_embedding() -> None:
    config = ModelConfig(vocab=32, dim=24, depth=4, tie_embeddings=True)
    model = HybridLM(config)
    assert model.head.weight is model.embedding.weight
    assert not torch.equal(HybridLM(CONFIG).head.weight, HybridLM(CONFIG).embedding.weight)


@every_config
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_dtypes(config: ModelConfig, dtype: torch.dtype, bound: float) -> None:
    model = HybridLM(config).to(dtype)
    exact = HybridLM(config).to(dtype).double()
    tokens, labels = sequences(), sequences().roll(-1, 1)
    logits = model(tokens)
    assert logits.dtype == dtype and relative(logits, exact(tokens)) < bound
    loss, _ = model.loss(tokens, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    exact.loss(tokens, labels)[0].backward()
    for name, weight in model.named_parameters():
        assert weight.grad.dtype == weight.dtype
        if dtype == torch.bfloat16 and name.endswith(("A_log", "dt_bias")):
            continue  # one number for a whole head, in which terms of both signs nearly cancel: noise, in bfloat16
        assert relative(weight.grad, exact.get_parameter(name).grad) < 4 * bound, name
    step, _ = model.step(tokens[:, 0], model.init_cache(2))
    assert step.dtype == dtype and relative(step, logits[:, 0]) < bound
