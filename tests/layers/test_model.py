"""HybridLM: what it computes, decoding, its loss, its initial weights and its dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.model import HybridLM
from layers.spec import ModelConfig
from tests.support.oracle import assert_close, relative

CONFIG = ModelConfig(
    vocab=32,
    dim=24,
    depth=5,
    heads=4,
    kv_heads=2,
    pattern=["linear", "lightning", "retention", "gla", "softmax"],
)


def sequences(batch: int = 2, length: int = 21) -> Tensor:
    return torch.randint(CONFIG.vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt()


def test_logits_by_hand() -> None:
    model = HybridLM(CONFIG).double()
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


def test_decoding_is_the_parallel_forward() -> None:
    model = HybridLM(CONFIG).double()
    tokens = sequences()
    want = model(tokens)
    cache = start = model.init_cache(2)
    for t in range(21):
        got, cache = model.step(tokens[:, t], cache)
        assert_close(f"token {t}", got, want[:, t], 1e-10)
    again, _ = model.step(tokens[:, 0], start)
    assert_close("the cache given stays as it is", again, want[:, 0], 1e-10)


def test_a_token_changes_no_logits_before_it() -> None:
    model = HybridLM(CONFIG)
    tokens = sequences()
    changed = tokens.clone()
    changed[:, 13] = (tokens[:, 13] + 1) % CONFIG.vocab
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert (before[:, 13:] != after[:, 13:]).any(dim=-1).all()


def test_loss_and_gradients_are_those_of_the_logits() -> None:
    tokens, labels = sequences(), sequences().roll(-1, 1)
    labels[:, -1] = -100
    model = HybridLM(CONFIG).double()
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


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = HybridLM(CONFIG)
    torch.manual_seed(2)
    second = HybridLM(CONFIG).double()
    third = HybridLM(CONFIG)
    third.init_weights(seed=7)
    for (name, weight), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(weight.double(), other), name
    second.float().init_weights(seed=7)
    for (name, weight), other in zip(third.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, other), name
        if "norm" not in name and "bias" not in name:
            assert not torch.equal(weight, first.get_parameter(name)), name


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


def test_tied_head_is_the_embedding() -> None:
    config = ModelConfig(vocab=32, dim=24, depth=4, tie_embeddings=True)
    model = HybridLM(config)
    assert model.head.weight is model.embedding.weight
    assert not torch.equal(HybridLM(CONFIG).head.weight, HybridLM(CONFIG).embedding.weight)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_dtypes(dtype: torch.dtype, bound: float) -> None:
    model = HybridLM(CONFIG).to(dtype)
    exact = HybridLM(CONFIG).to(dtype).double()
    tokens, labels = sequences(), sequences().roll(-1, 1)
    logits = model(tokens)
    assert logits.dtype == dtype and relative(logits, exact(tokens)) < bound
    loss, _ = model.loss(tokens, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    exact.loss(tokens, labels)[0].backward()
    for name, weight in model.named_parameters():
        assert weight.grad.dtype == dtype
        assert relative(weight.grad, exact.get_parameter(name).grad) < 4 * bound, name
    step, _ = model.step(tokens[:, 0], model.init_cache(2))
    assert step.dtype == dtype and relative(step, logits[:, 0]) < bound
