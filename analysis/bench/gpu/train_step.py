"""The step of Linear-Llama3-1B on one rank: forward, backward and AdamW on its own tokens, without communication.

Linear-Llama3-1B is the model of LASP-2 (arXiv 2502.07563, A.5.3): 16 layers, hidden 2048, 16 heads, Llama 3's
vocabulary, basic linear attention, alone or with softmax in every fourth layer. The paper does not give the MLP's
width; the released script has 8192. Embeddings are tied. The rank's tokens are its whole sequence, so softmax layers
attend to no other rank's tokens. Parameters and AdamW's moments have the model's dtype.

MFU counts 3 times the forward FLOPs of `layers/cost.py`, without recomputation. It is given over the measured product
of matrices and over the datasheet's dense bf16.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from analysis.bench.device import Ceilings
from analysis.bench.sizes import KernelSizes
from analysis.bench.stopwatch import Budget, Stopwatch, Timed
from analysis.tables import Table
from layers.config import ModelConfig, model_facts
from layers.model import HybridLM

RATIOS = {"pure": "0", "1/4 hybrid": "1/4"}
RECOMPUTED = {"none": 0, "every second block": 2, "every block": 1}  # every n-th block, 0: none; tried in this order
DATASHEET = 989e12  # FLOPs a second of an H100 or H200 SXM in dense bf16


@dataclass(kw_only=True)
class Step:
    """The steps of one model at one length; `flops` counts the FLOPs of one step."""

    name: str
    length: int
    flops: float
    recomputed: str
    peak_bytes: int
    values: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.values)

    def facts(self) -> dict[str, Any]:
        """Return the entry of results.json."""
        return {
            "name": self.name,
            "length": self.length,
            "flops": self.flops,
            "recomputed": self.recomputed,
            "peak_bytes": self.peak_bytes,
            "tokens_per_second": self.length / self.seconds,
        }


def measure_steps(
    shape: KernelSizes, watch: Stopwatch, dtype: torch.dtype, budget: Budget, notes: list[str]
) -> list[Step]:
    """Measure the steps of every model at every length, as far as memory and time allow."""
    done = []
    for kind, ratio in RATIOS.items():
        config = ModelConfig(linear="linear", ratio=ratio, tie_embeddings=True, **shape.model)
        with watch.device:
            model = UninitializedLM(config).to(dtype)
        for length in shape.model_lengths:
            name = f"step, {kind}"
            if budget.over:
                notes.append(f"not measured, out of time: {name}, T={length}")
                continue
            try:
                done.append(_measure(name, model, length, shape.model_steps, watch, budget))
            except torch.OutOfMemoryError:
                notes.append(f"failed: {name}, T={length}: out of memory even with every block recomputed")
        del model
    return done


class UninitializedLM(HybridLM):
    """The HybridLM with the initial weights of torch's layers, drawn on the device.

    The weights of HybridLM itself are drawn on a CPU, which takes minutes.
    """

    def init_weights(self, seed: int) -> None:
        pass


def _measure(name: str, model: HybridLM, length: int, repetitions: int, watch: Stopwatch, budget: Budget) -> Step:
    tokens, labels = (torch.randint(model.config.vocab, (1, length), device=watch.device) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=watch.device.type == "cuda")

    def run() -> None:
        loss, valid = model.loss(tokens, labels)
        (loss / valid).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for every in RECOMPUTED.values():
        model.recompute = frozenset(range(0, model.config.depth, every)) if every else frozenset()
        if _fits(run):
            break
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    peak = watch.peak_bytes(run)
    before = torch.cuda.memory_allocated(watch.device) if watch.device.type == "cuda" else 0
    step = Step(
        name=name,
        length=length,
        flops=3 * model_facts(model.config).flops(length),
        recomputed=next(words for words, one_in in RECOMPUTED.items() if one_in == every),
        peak_bytes=before + peak,
    )
    for _ in range(repetitions):
        start = time.monotonic()
        step.values.append(watch.time(run).device)
        if time.monotonic() - start > budget.left:
            break
    return step


def _fits(run: Timed) -> bool:
    """Warm up, which makes AdamW's moments, and return False if memory runs out.

    The tensors of a failed run are free once this function returns.
    """
    try:
        run()
    except torch.OutOfMemoryError:
        return False
    return True


def step_table(done: list[Step], limits: Ceilings) -> Iterator[str | Table]:
    """Yield the table of the steps."""
    if done:
        yield "One rank's step of Linear-Llama3-1B, forward, backward and AdamW, no communication:"
        header = (
            "model",
            "tokens per rank",
            "ms",
            "tokens/s",
            "TFLOP/s",
            "MFU, of the matmul measured",
            "of 989 TFLOP/s",
            "memory GiB",
            "blocks recomputed",
        )
        rows = tuple(
            (
                step.name.removeprefix("step, "),
                str(step.length),
                f"{step.seconds * 1e3:.1f}",
                f"{step.length / step.seconds:,.0f}",
                f"{step.flops / step.seconds / 1e12:,.1f}",
                f"{step.flops / step.seconds / limits.matmul:.1%}",
                f"{step.flops / step.seconds / DATASHEET:.1%}",
                f"{step.peak_bytes / 2**30:.1f}",
                step.recomputed,
            )
            for step in done
        )
        yield Table(header=header, rows=rows, numbers=frozenset(header[1:-1]))
