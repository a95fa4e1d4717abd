"""The stopwatches: for contenders that take turns on a CPU, and for single calls on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis.bench.meter import Meter
from analysis.bench.result import Row

THREADS = 2  # in a process that measures alone
FLUSHED = 2**28  # bytes written between two calls, several times any L2
AHEAD = 1.5  # the pause before a timed call, in multiples of the time that its launches take the host
LONGEST_PAUSE = 0.02  # seconds

Timed = Callable[[], object]


def time_in_turns(cases: Mapping[int, Mapping[str, Timed]], repetitions: int) -> dict[tuple[str, int], Row]:
    """Return the seconds of every contender at every length, by name and length.

    Contenders take turns in every round; the first round warms up and does not count.
    """
    torch.set_num_threads(THREADS)
    rows = {(name, length): Row(contender=name, length=length) for length in cases for name in cases[length]}
    for repetition in range(-1, repetitions):
        for length, contenders in cases.items():
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                if repetition >= 0:
                    rows[name, length].values.append(time.perf_counter() - start)
    return rows


def forward_backward(operator: Callable[..., Tensor], inputs: Sequence[Tensor], d_o: Tensor) -> Timed:
    """Return a function that calls the operator on copies of the inputs and computes all their gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return lambda: torch.autograd.grad(operator(*leaves), leaves, d_o)


class Budget:
    """The seconds that a part of a benchmark may take; it drops repetitions rather than overrun."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left == 0.0


class Time(NamedTuple):
    """The seconds of a call on the device, and the seconds of its launches on the host."""

    device: float
    host: float


class Stopwatch:
    """Time calls on a device.

    On CUDA the stopwatch flushes the caches, queues the launches behind a pause, and reads the time between two events.
    This is the time of the device; it leaves out the launching. On a CPU the two times are the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device)
            self._cycles_per_second = self._calibrate()

    def _calibrate(self) -> float:
        cycles = 10_000_000
        for _ in range(2):
            begin, end = _events()
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return cycles / (begin.elapsed_time(end) / 1e3)

    def pause(self, seconds: float) -> None:
        """Keep the device busy while the host launches the next kernels."""
        if self.device.type == "cuda":
            torch.cuda._sleep(int(min(seconds, LONGEST_PAUSE) * self._cycles_per_second))

    def time(self, run: Timed, launching: float = 0.0) -> Time:
        """Time one call; `launching` is the host's time for an earlier call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            return Time(seconds, seconds)
        torch.cuda.synchronize(self.device)
        self._flushed.zero_()
        self.pause(AHEAD * launching + 1e-4)
        begin, end = _events()
        start = time.perf_counter()
        begin.record()
        run()
        end.record()
        host = time.perf_counter() - start
        end.synchronize()
        return Time(begin.elapsed_time(end) / 1e3, host)

    def median(self, run: Timed, repetitions: int) -> float:
        """Return the device's median seconds, after a call that warms up."""
        launching = self.time(run).host
        return statistics.median(self.time(run, launching).device for _ in range(repetitions))

    def peak_bytes(self, run: Timed) -> int:
        """Return the peak memory of a call in bytes, without the memory in use before it."""
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


def _events() -> tuple[Any, Any]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return begin, end
