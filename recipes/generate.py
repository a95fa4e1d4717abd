"""Generate text: ``python -m recipes.generate RUN_FOLDER --prompt "def " --tokens 300 --temperature 0.8``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from layers.model import HybridLM
from recipes import checkpoint
from recipes.config import RecipeError
from recipes.load import load_resolved

PROMPT = "def "


@torch.no_grad()
def generate(model: HybridLM, prompt: str, tokens: int, temperature: float = 1.0, seed: int = 0) -> str:
    """Return ``prompt`` and ``tokens`` more bytes, drawn one by one from softmax(logits / temperature).

    One pass reads the prompt; `HybridLM.step` then decodes on one device. Linear blocks keep a state of constant size,
    softmax blocks their keys and values. Temperature 0 takes the likeliest byte. The global random state does not
    change; bytes that are not UTF-8 become U+FFFD. Raise ValueError for an argument out of its range.
    """
    written = list(prompt.encode(errors="surrogateescape"))  # also bytes of a command line that are not UTF-8
    for name, value, valid, allowed in (
        ("prompt", repr(prompt), written, "it must not be empty"),
        ("tokens", tokens, tokens >= 0, "it must be at least 0"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "it must be a finite number, at least 0"),
        ("seed", seed, -(2**63) <= seed < 2**64, "it must be an integer from -2**63 to 2**64 - 1"),
    ):
        if not valid:
            raise ValueError(f"{name} is {value}; {allowed}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    logits_BV, cache = model.prefill(torch.tensor([written], device=device))
    for number in range(tokens):
        if number:
            logits_BV, cache = model.step(torch.tensor(written[-1:], device=device), cache)
        written.append(_draw(logits_BV[0].double().cpu(), temperature, generator))
    return bytes(written).decode("utf-8", errors="replace")


def _draw(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    scaled_V = (logits_V - logits_V.max()) / temperature  # at most 0, so a small temperature cannot overflow
    return int(torch.multinomial(torch.softmax(scaled_V, -1), 1, generator=generator))


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 printed, 2 not possible."""
    parser = argparse.ArgumentParser(prog="python -m recipes.generate", description="Text from a trained run.")
    parser.add_argument("folder", type=Path, help="run folder, such as runs/quickstart")
    parser.add_argument("--prompt", default=PROMPT, help=f"what the text begins with (default {PROMPT!r})")
    parser.add_argument("--tokens", type=int, default=300, help="bytes to add (default 300)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest byte (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (default 0)")
    chosen = parser.parse_args(arguments)
    try:
        model = load_model(chosen.folder)
        print(generate(model, chosen.prompt, chosen.tokens, chosen.temperature, chosen.seed))
    except (RecipeError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load_model(folder: Path) -> HybridLM:
    """Load the model of a run folder: the weights of the newest sound checkpoint, in the run's dtype, on the CPU."""
    recipe = load_resolved(folder / "recipe.yaml")
    dtype = getattr(torch, recipe.train.dtype)
    masters = torch.promote_types(dtype, torch.float32)  # the checkpoint's dtype; training rounds to dtype
    model = HybridLM(replace(recipe.model, backend="auto")).to(masters)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    checkpoint.load_weights(folder / "checkpoints", {name: p.detach() for name, p in weights.items()})
    return model.to(dtype)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
