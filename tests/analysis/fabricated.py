"""Fabricated run folders: what the trainer leaves behind, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recipes.config import Recipe

UNIGRAM = 4.8
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LETTERS = {"0": "LLLLLLLL", "1/8": "LLLLLLLN", "1/4": "LLLNLLLN", "1/2": "LNLNLNLN", "1": "NNNNNNNN"}


def write_run(
    folder: Path,
    *,
    linear: str = "gla",
    ratio: str = "1/4",
    seed: int = 0,
    bits: float = 2.5,
    steps: int = 60,
    changes: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> Path:
    """Write one finished run that ends at `bits` bits per byte; `changes` are further recipe values by dotted key,
    `metrics` further numbers of every training step."""
    folder.mkdir(parents=True)
    recipe = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(Recipe)))
    values = {
        "name": folder.name,
        "model.linear": linear,
        "model.ratio": ratio,
        "train.seed": seed,
        "train.steps": steps,
    }
    for key, value in (values | (changes or {})).items():
        OmegaConf.update(recipe, key, value)
    OmegaConf.save(recipe, folder / "recipe.yaml")
    write_json(
        folder / "provenance.json",
        {
            "command": "python -m recipes.train recipes/quickstart.yaml",
            "commit": COMMIT,
            "versions": {"torch": "2.13.0", "python": "3.12"},
            "dp": 1,
            "sp": 2,
            "world": 2,
            "started": "2026-01-01T00:00:00",
            "machine": {"cpus": 2},
            "corpus": {"fingerprint": "ab" * 32, "files": 7, "bytes": 1_000_000},
        },
    )
    lines = []
    for step in range(1, steps + 1):
        now = (bits + (8 - bits) * math.exp(-6 * step / steps) if step < steps else bits) + 0.02 * math.sin(step)
        lines.append(
            {
                "kind": "train",
                "step": step,
                "loss": now * math.log(2),
                "grad_norm": 1.0,
                "lr": 1e-3,
                "tokens": 1024 * step,
                "tokens_per_second": 9000.0,
                "memory_mb": 300.0,
                "comm/exposed_ms": 0.5,
                "comm/calls": 40,
                "comm/bytes": 100_000,
                **(metrics or {}),
            }
        )
        if step % 10 == 0:
            held_out = bits if step == steps else now + 0.05
            lines.append(
                {
                    "kind": "validation",
                    "step": step,
                    "tokens": 1024 * step,
                    "loss": held_out * math.log(2),
                    "bits_per_byte": held_out,
                    "unigram_bits_per_byte": UNIGRAM,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(
        folder / "summary.json",
        {
            "status": "finished",
            "steps": steps,
            "tokens": 1024 * steps,
            "seconds": 100.0,
            "parameters": 900_000,
            "pattern": LETTERS[ratio],
            "train_loss": bits * math.log(2),
            "validation_loss": bits * math.log(2),
            "bits_per_byte": bits,
            "unigram_bits_per_byte": UNIGRAM,
            "below_unigram": 1 - bits / UNIGRAM,
        },
    )
    return folder


def write_json(file: Path, record: dict[str, Any]) -> None:
    file.write_text(json.dumps(record))


BITS = {
    "lightning": {"0": 2.72, "1/8": 2.61, "1/4": 2.55, "1/2": 2.53},
    "gla": {"0": 2.60, "1/8": 2.54, "1/4": 2.51, "1/2": 2.52},
}


def write_sweep(folder: Path, steps: int = 60) -> Path:
    """Write the eleven runs of a sweep over five ratios and two kinds, with three seeds of one cell, and its plan."""
    cells = []
    for linear, row in BITS.items():
        for ratio, bits in row.items():
            name = f"ratio-{ratio.replace('/', '-')}_linear-{linear}"
            write_run(folder / name, linear=linear, ratio=ratio, bits=bits, steps=steps)
            cells.append({"name": name, "covers": [{"model.ratio": ratio, "model.linear": linear}]})
    write_run(folder / "ratio-1", linear="lightning", ratio="1", bits=2.56, steps=steps)
    cells.append({"name": "ratio-1", "covers": [{"model.ratio": "1", "model.linear": linear} for linear in BITS]})
    for seed, bits in ((1, 2.50), (2, 2.54)):
        name = f"ratio-1-4_linear-gla_seed-{seed}"
        write_run(folder / name, seed=seed, bits=bits, steps=steps)
        cells.append({"name": name, "covers": [{"model.ratio": "1/4", "model.linear": "gla", "train.seed": seed}]})
    command = "python -m recipes.sweep recipes/ablations/hybrid_ratio.yaml"
    write_json(
        folder / "sweep.json",
        {"name": folder.name, "file": "hybrid_ratio.yaml", "command": command, "nproc": 2, "cells": cells},
    )
    return folder
