"""Text from a trained run: the bytes are those that the parallel forward pass predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layers.config import ModelConfig
from layers.model import HybridLM
from recipes import checkpoint
from recipes.generate import generate, load_model, main
from recipes.load import load_resolved
from recipes.optim import Optimizer
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


def test_a_prompt_is_read_at_once(model: HybridLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [], HybridLM.step
    monkeypatch.setattr(HybridLM, "step", lambda *arguments: (steps.append(1), step(*arguments))[1])
    assert len(generate(model, "prompt " * 20, 3, temperature=0.0, seed=1)) >= 140
    assert len(steps) == 2


def test_no_temperature_is_too_small_and_nothing_is_added_to_nothing(model: HybridLM) -> None:
    likeliest = generate(model, "x", 6, temperature=0.0)
    for temperature in (5e-324, 1e-320, 1e-200):
        assert generate(model, "x", 6, temperature=temperature) == likeliest
    assert generate(model, "x", 0) == "x"
    assert generate(model, "x", 2, seed=2**64 - 1) and generate(model, "x", 2, seed=-(2**63))
    assert generate(model, "caf\udce9", 0) == "caf\ufffd", "a byte of the command line that is not UTF-8"


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate")
    options = (
        "train.steps=3",
        "train.dtype=bfloat16",
        "model.pattern=[mamba2, gla]",
        "train.sample=40",
        "optim.lr=0.1",
    )
    assert run_program(str(tiny), f"out={out}", "name=run", *options).ok
    return out / "run"


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--temperature", "nan", "temperature is nan; it must be a finite number, at least 0"),
        ("--temperature", "inf", "temperature is inf; it must be a finite number, at least 0"),
        ("--temperature", "-1e-320", "it must be a finite number, at least 0"),
        ("--tokens", "-5", "tokens is -5; it must be at least 0"),
        ("--seed", str(2**64), f"seed is {2**64}; it must be an integer from -2**63 to 2**64 - 1"),
        ("--seed", str(-(2**63) - 1), "it must be an integer from -2**63 to 2**64 - 1"),
        ("--prompt", "", "prompt is ''; it must not be empty"),
    ],
)
def test_arguments_out_of_range_are_one_line(
    run: Path, option: str, value: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), f"{option}={value}"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert allowed in said.err


def test_the_command_writes_what_the_trained_model_wrote(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--tokens", "40", "--seed", "0"]) == 0
    assert capsys.readouterr().out == (run / "sample.txt").read_text() + "\n"


def test_generating_runs_the_model_that_was_trained(run: Path) -> None:
    """Every weight in its dtype and to the bit, and so every logit: bf16 of the masters, gates in fp32."""
    recipe = load_resolved(run / "recipe.yaml")
    trained = HybridLM(recipe.model).to(torch.bfloat16)
    optimizer = Optimizer(trained, recipe.optim)
    checkpoint.load_weights(run / "checkpoints", optimizer.state()["model"])
    optimizer.publish()
    loaded = load_model(run)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, trained.get_parameter(name)) and p.dtype == trained.get_parameter(name).dtype, name
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16, torch.float32}
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens), trained(tokens))


def test_the_command(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(str(tiny), f"out={tmp_path}", "name=run", "train.steps=3").ok
    assert main([str(tmp_path / "run"), "--prompt", "rank", "--tokens", "8", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("rank")
    resolved = tmp_path / "run" / "recipe.yaml"
    resolved.write_text(resolved.read_text().replace("backend: auto", "backend: flash_attn"))
    assert main([str(tmp_path / "run"), "--tokens", "2"]) == 0, "trained on a device, and read on the CPU"
    assert main([str(tmp_path / "nothing")]) == 2
    assert "recipe.yaml: cannot be read" in capsys.readouterr().err
