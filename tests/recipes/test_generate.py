"""Text from a trained run: the bytes are those that the parallel forward pass predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layers.model import HybridLM
from layers.spec import ModelConfig
from recipes.generate import generate, main
from tests.recipes.program import run_program


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return HybridLM(ModelConfig(dim=16, depth=2, heads=2, pattern=["gla", "softmax"])).double()


def test_temperature_zero_takes_what_the_forward_pass_finds_likeliest(model: HybridLM) -> None:
    with torch.no_grad():
        model.head.weight[128:] = 0.0  # text stays ASCII, so that bytes and characters are the same
        model.head.weight[:32] = 0.0
        text = generate(model, "def f", 12, temperature=0.0)
        tokens = torch.tensor(list(text.encode()))
        want = model(tokens[None])[0].argmax(-1)
    assert len(text) == 17 and text.startswith("def f")
    assert torch.equal(tokens[5:], want[4:-1])


def test_draws_depend_on_the_seed_alone(model: HybridLM) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, "x", 20, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert generate(model, "x", 20, seed=3) == first != generate(model, "x", 20, seed=4)


def test_nothing_to_go_on_from(model: HybridLM) -> None:
    with pytest.raises(ValueError, match="prompt must not be empty"):
        generate(model, "", 3)


def test_the_command(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(str(tiny), f"out={tmp_path}", "name=run", "train.steps=3").ok
    assert main([str(tmp_path / "run"), "--prompt", "rank", "--tokens", "8", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("rank")
    resolved = tmp_path / "run" / "recipe.yaml"
    resolved.write_text(resolved.read_text().replace("backend: auto", "backend: flash_attn"))
    assert main([str(tmp_path / "run"), "--tokens", "2"]) == 0, "trained on a device, and read on the CPU"
    assert main([str(tmp_path / "nothing")]) == 2
    assert "recipe.yaml: cannot be read" in capsys.readouterr().err
