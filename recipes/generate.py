"""Text from a trained run: ``python -m recipes.generate RUN_FOLDER --prompt "def " --tokens 300 --temperature 0.8``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from layers.model import HybridLM
from recipes import checkpoint, config
from recipes.config import RecipeError

PROMPT = "def "


@torch.no_grad()
def generate(model: HybridLM, prompt: str, tokens: int, temperature: float = 1.0, seed: int = 0) -> str:
    """``prompt`` and ``tokens`` bytes after it, drawn one by one from softmax(logits / temperature).

    Decodes on one device with `HybridLM.step`: linear blocks keep a state of constant size, softmax blocks their keys
    and values. Temperature 0 takes the likeliest byte. The global random state is left alone; bytes that are not UTF-8
    become U+FFFD. Raises ValueError for an empty prompt or a negative temperature.
    """
    written = list(prompt.encode())
    if not written or temperature < 0:
        raise ValueError(f"prompt must not be empty and temperature at least 0, got {prompt!r} and {temperature}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    cache = model.init_cache(1)
    for place in range(len(written) + tokens - 1):
        logits_BV, cache = model.step(torch.tensor([written[place]], device=device), cache)
        if place + 1 == len(written):
            written.append(_draw(logits_BV[0].double().cpu(), temperature, generator))
    return bytes(written).decode("utf-8", errors="replace")


def _draw(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1, generator=generator))


def main(arguments: Sequence[str]) -> int:
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
    """The model of a run folder with the weights of its newest sound checkpoint, on the CPU."""
    recipe = config.load_resolved(folder / "recipe.yaml")
    dtype = torch.float64 if recipe.train.dtype == "float64" else torch.float32  # the masters of narrower weights
    model = HybridLM(replace(recipe.model, backend="auto")).to(dtype)
    checkpoint.load_weights(folder / "checkpoints", {name: p.detach() for name, p in model.named_parameters()})
    return model


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
