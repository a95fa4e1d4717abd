"""The sizes of every benchmark: one set for the published tables, and a tiny set to see that the programs work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KernelSizes:
    """The sizes of `kernels` on a CUDA device; on a CPU it takes the quick sizes, in fp32."""

    lengths: tuple[int, ...] = tuple(2**n for n in range(12, 19))  # 4K to 256K tokens
    heads: tuple[int, ...] = (16, 32)
    width: int = 128
    softmax_until: int = 65536  # tokens; the cost of softmax is quadratic
    tuned_at: int = 32768  # tokens at which fla-core chooses its configurations, and `tune` ours
    tuned_widths: tuple[int, ...] = (128, 64)
    tuning_seconds: float = 170.0  # of `tune`
    repetitions: int = 15
    copied: int = 2**32  # bytes
    side: int = 8192  # rows of the square matrices whose product gives the ceiling
    model: dict[str, Any] = field(
        default_factory=lambda: {"vocab": 128256, "dim": 2048, "depth": 16, "heads": 16, "mlp_dim": 8192}
    )
    model_lengths: tuple[int, ...] = (16384, 65536)  # tokens per rank
    model_steps: int = 5
    # Budgets for compiling and tuning, the operators, the model's steps, and the phases: ten minutes in all.
    seconds: tuple[float, float, float, float] = (200.0, 220.0, 120.0, 30.0)

    def within(self, seconds: float) -> KernelSizes:
        """Return sizes with budgets that make `kernels`, or `tune`, end in so many seconds.

        Much less time is for one number of heads and every second length.
        """
        short = seconds < sum(self.seconds) / 2
        heads, lengths = (self.heads[:1], self.lengths[1::2]) if short else (self.heads, self.lengths)
        compiling, operators, steps, phases = (part * seconds / sum(self.seconds) for part in self.seconds)
        budgets = compiling, operators, steps, phases
        return replace(self, heads=heads, lengths=lengths, seconds=budgets, tuning_seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the published tables."""

    lengths: tuple[int, ...] = (4096, 16384, 65536)
    compared: tuple[int, ...] = (4096, 16384)  # other packages need quadratic time or memory, so stop here
    repetitions: int = 7
    mixer_repetitions: int = 3
    expert_tokens: int = 4096
    expert_repetitions: int = 15
    model_length: int = 16384
    model_steps: int = 5
    model_repetitions: int = 3
    rank_length: int = 16384  # tokens of the whole sequence, in comparisons of strategies
    rank_repetitions: int = 15
    slow_repetitions: int = 2  # for contenders that take seconds
    tokens_per_rank: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    megabits: float = 40.0  # per second, on every rank's link
    overlap_repetitions: int = 20
    overlap_megabits: float = 120.0
    memory_lengths: tuple[int, int] = (4096, 8192)  # memory per token is equal at both
    rounds: int = 3  # of processes, in `limit`
    short_model_length: int = 512  # of the quickstart
    short_model_steps: int = 60
    against: Path | None = None  # the checkout of another commit, which `limit` measures in turn
    kernels: KernelSizes = KernelSizes()


QUICK = Sizes(
    lengths=(128, 256),
    compared=(128,),
    repetitions=2,
    mixer_repetitions=1,
    model_length=128,
    model_steps=2,
    model_repetitions=1,
    rank_length=256,
    rank_repetitions=2,
    slow_repetitions=1,
    tokens_per_rank=(64, 128),
    megabits=200.0,
    overlap_repetitions=2,
    overlap_megabits=200.0,
    memory_lengths=(128, 256),
    expert_tokens=64,
    expert_repetitions=1,
    rounds=1,
    short_model_length=64,
    short_model_steps=3,
    kernels=KernelSizes(
        lengths=(48, 96),
        heads=(1, 2),
        width=16,
        softmax_until=48,
        tuned_at=48,
        tuned_widths=(16,),
        tuning_seconds=600.0,
        repetitions=2,
        copied=2**20,
        side=64,
        model={"vocab": 64, "dim": 32, "depth": 4, "heads": 2, "mlp_dim": 64},
        model_lengths=(48, 96),
        model_steps=2,
        seconds=(600.0, 600.0, 600.0, 600.0),
    ),
)
