"""The device of a benchmark: its facts, the backend that suits it, and its measured ceilings."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from analysis.bench.stopwatch import Stopwatch
from hybrid_sp import backends
from hybrid_sp.backends import interpreted


def default_device() -> torch.device:
    """Return the CUDA device, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def linear_backend() -> str:
    """Return the backend that suits the device, or our own if Triton interprets its kernels."""
    return "triton" if interpreted() else "auto"


def device_facts() -> dict[str, Any] | None:
    """Return the name, size and versions of the CUDA device, or None without one."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "cuda": torch.version.cuda,
    }


def allow_any_triton() -> str:
    """Let this process run kernels by a Triton that the engine refuses on a Hopper, and return a note on that, or "".

    Checks and measurements of the kernels themselves find out what such a Triton does.
    """
    if not torch.cuda.is_available():
        return ""
    try:
        backends.check_triton(torch.device("cuda"))
    except ImportError as error:
        backends.TRITON_ON_HOPPER = (0, 0, 0)
        return f"this Triton is one that hybrid_sp refuses, and runs here all the same: {error}"
    return ""


class Ceilings(NamedTuple):
    """The measured limits of the device: bytes read plus bytes written per second, and FLOPs per second."""

    copy: float
    matmul: float


def ceilings(watch: Stopwatch, dtype: torch.dtype, copied: int, side: int, repetitions: int) -> Ceilings:
    """Measure a copy of `copied` bytes within the device, and a product of two random square matrices."""
    source = torch.randint(0, 100, (copied,), dtype=torch.int8, device=watch.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, dtype=dtype, device=watch.device) for _ in range(2))
    product = torch.empty_like(left)
    copy = watch.median(lambda: target.copy_(source), repetitions)
    matmul = watch.median(lambda: torch.mm(left, right, out=product), repetitions)
    return Ceilings(2 * copied / copy, 2 * side**3 / matmul)
