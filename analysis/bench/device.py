"""The device that a benchmark runs on: what it is, a stopwatch for it, and what it can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from analysis.bench.meter import Meter
from hybrid_sp.backends import interpreted

FLUSHED = 2**28  # bytes written between two calls, several times any L2
AHEAD = 1.5  # the pause before a timed call, in times of what its launches take the host
LONGEST_PAUSE = 0.02  # seconds


def default_device() -> torch.device:
    """The CUDA device, if there is one that kernels can run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def linear_backend() -> str:
    """What suits the device, or our kernels where Triton is set to interpret them."""
    return "triton" if interpreted() else "auto"


def device_facts() -> dict[str, Any] | None:
    """What the CUDA device is, or None without one."""
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


class Budget:
    """Seconds that a part of a benchmark may take: it drops repetitions rather than overrun."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left == 0.0


class Time(NamedTuple):
    """Seconds of the device, and those that the host took to launch it."""

    device: float
    host: float


class Stopwatch:
    """Times calls on a device.

    On CUDA between two events, with the caches flushed before and the launches queued behind a pause, so that the time
    is the device's and not that of launching. On a CPU both are the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: dict[int, float] = {}
        if device.type == "cuda":
            self._flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device)
            self._cycles_per_second = self._calibrate()

    def _calibrate(self) -> float:
        cycles = 10_000_000
        for _ in range(2):
            begin, end = _events(self.device)
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return cycles / (begin.elapsed_time(end) / 1e3)

    def pause(self, seconds: float) -> None:
        """Keep the device busy while the host launches what comes next."""
        if self.device.type == "cuda":
            torch.cuda._sleep(int(min(seconds, LONGEST_PAUSE) * self._cycles_per_second))

    def time(self, run: Callable[[], object], launching: float = 0.0) -> Time:
        """One call; `launching` is what it took the host before."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            return Time(seconds, seconds)
        torch.cuda.synchronize(self.device)
        self._flushed.zero_()
        self.pause(AHEAD * launching + 1e-4)
        begin, end = _events(self.device)
        start = time.perf_counter()
        begin.record()
        run()
        end.record()
        host = time.perf_counter() - start
        end.synchronize()
        return Time(begin.elapsed_time(end) / 1e3, host)

    def median(self, run: Callable[[], object], repetitions: int) -> float:
        """Seconds of the device, the median after a call that warms up."""
        launching = self.time(run).host
        return statistics.median(self.time(run, launching).device for _ in range(repetitions))

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most memory that a call has on top of what there was before it."""
        if self.device.type != "cuda":
            with Meter() as meter:
                run()
            return meter.peak
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def _events(device: torch.device) -> tuple[Any, Any]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return begin, end


class Ceilings(NamedTuple):
    """What the device does at most, measured: bytes read plus bytes written a second, and FLOPs a second."""

    copy: float
    matmul: float


def ceilings(watch: Stopwatch, dtype: torch.dtype, copied: int, side: int, repetitions: int) -> Ceilings:
    """A copy of `copied` bytes within the device, and a product of two random square matrices."""
    copy, matmul = _copy(copied, watch.device), _matmul(side, dtype, watch.device)
    return Ceilings(2 * copied / watch.median(copy, repetitions), 2 * side**3 / watch.median(matmul, repetitions))


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    source = torch.randint(0, 100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _matmul(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)
