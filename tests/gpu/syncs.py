"""Every mixer's block, forward and backward, while torch raises at whatever makes the host wait for the device.

    python -m tests.gpu.syncs

It says which mixers stop the host and where, all of them. Exit code 77 without a CUDA device.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import hybrid_sp as hsp
from analysis.bench.device import allow_any_triton
from layers.block import Block, FeedForward
from layers.registry import MIXERS, BlockContext, mixer_spec
from tests.gpu.attention import two_configurations

CUDA = torch.device("cuda")
LACKING = 77  # the exit code of a check that this machine cannot run
CONTEXT = BlockContext(dim=256, heads=4, kv_heads=2, layer=1, depth=4, norm_eps=1e-6, rope_base=10000.0)
LENGTH = 1024  # tokens of each rank
FORMS: dict[str, tuple[float, ...]] = {"whole": (), "packed": (0.1, 0.35, 0.36)}  # where documents begin, as shares


@contextmanager
def no_syncs() -> Iterator[None]:
    """Raise RuntimeError at what makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(block: Block, x: Tensor, shard: hsp.Shard) -> list[Tensor]:
    """The output, and the gradients of the input and of the weights."""
    y, *_ = block(x, shard)
    return [y, *torch.autograd.grad(y.float().sum(), [x, *block.parameters()])]


def stops(group: Any, device: torch.device, mixers: Sequence[str], length: int, dim: int) -> dict[str, str]:
    """Where the host stops, for each mixer and form in which it does. The first two steps make plans and compile."""
    sp, found = hsp.SequenceParallel(group, layout="zigzag"), {}
    for name in mixers:
        for form, shares in FORMS.items():
            torch.manual_seed(0)
            block = Block(mixer_spec(name), replace(CONTEXT, dim=dim), FeedForward(2 * dim)).to(device, torch.bfloat16)
            whole = length * sp.size
            shard = sp.shard(whole, [0, *(int(share * whole) for share in shares), whole] if shares else None)
            x = torch.randn(1, shard.tokens, dim).to(device, torch.bfloat16).requires_grad_()
            try:
                for _ in range(2):
                    step(block, x, shard)
                with no_syncs():
                    step(block, x, shard)
            except Exception as error:  # whatever it is, the other mixers go on
                found[f"{name}, {form}"] = f"{type(error).__name__}: {error} at {_ours(error)}"
            print(f"{name}, {form}: {found.get(f'{name}, {form}', 'the host waits for nothing')}", flush=True)
    return found


def _ours(error: BaseException) -> str:
    """The innermost lines of this project, the first ones of the autograd engine's are not to be had."""
    rooms = ("/hybrid_sp/", "/layers/")
    lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return next((line for line in reversed(lines) if any(room in line for room in rooms)), lines[-1])


def main() -> int:
    if not torch.cuda.is_available():
        print("needs CUDA")
        return LACKING
    print(allow_any_triton())
    with two_configurations():
        found = stops(None, CUDA, sorted(MIXERS), LENGTH, CONTEXT.dim)
    count = len(MIXERS) * len(FORMS)
    print("; ".join(f"{name}: {where}" for name, where in found.items()) or f"{count} forms, none stops the host")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
