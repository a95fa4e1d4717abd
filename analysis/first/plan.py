"""The plan of a first run: what is checked and measured on one device, and on several, in order of worth.

Checks live in `tests/gpu`; each is a program with an exit code. `share` is set so that ten minutes suffice on an H200.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from analysis.first.stages import ROOT, Stage

CACHE = ROOT / "runs" / "gpu-cache"
SHARES = {"syncs": 3.0, "loss": 1.5}  # kernels of all mixers are compiled; timeouts must pass
CHECKS = {  # the ten of `tests.gpu.ranks.py`
    "start": "devices, collectives, rows of nothing",
    "parity": "every exchange, layout and form against the token loop in fp64",
    "auto": 'linear="auto" measures a link and ends',
    "order": "3 or 4 ranks: first messages between all pairs",
    "overlap": "the same bits with and without overlap, many times",
    "stress": "the same bits with a rank that is late and a full allocator",
    "syncs": "no mixer stops the host, zigzag and packed, on all ranks",
    "hidden": "the exchange runs beside the local work",
    "loss": "a rank that dies or leaves out a layer ends all in time",
    "train": "steps of a model: losses and weights as on one rank, resumed, memory flat",
}


def one_device(commit: str | None) -> list[Stage]:
    """Return the stages of one device. The commit is that of a copy without git."""
    on_device = _on_device()

    def stage(name: str, about: str, share: float, *words: str, until: str = "") -> Stage:
        command = [sys.executable, *words]
        return Stage(name=name, about=about, command=command, share=share, environment=on_device, until=until)

    return [
        stage("machine", "versions, drivers, devices", 10, "-m", "analysis.first.machine"),
        stage("compile", "kernels of all contenders", 0, "-m", "analysis.bench.gpu.compilation", until="tune"),
        stage("correct", "every backend against fp64", 160, *_ptxas("--once", "--tests", "-k", "not memcheck")),
        stage("syncs", "no mixer stops the host, zigzag and packed", 40, "-m", "tests.gpu.syncs"),
        stage("memcheck", "small odd shapes under compute-sanitizer", 60, "-m", "tests.gpu.memcheck", "--watched"),
        stage("ptxas", "the same kernels by two ptxas", 70, *_ptxas()),
        stage("tune", "five launch parameters of each kernel", 110, *_bench("tune", commit)),
        stage("kernels", "speed beside fla-core and flash attention", 130, *_bench("kernels", commit)),
    ]


def several_ranks(ranks: int, device: str) -> list[Stage]:
    """Return the ten checks on several ranks, with a device each."""
    environment = _on_device() if device == "cuda" else {}
    command = [sys.executable, "-m", "tests.gpu.ranks", "--ranks", str(ranks), "--device", device]
    return [
        Stage(
            name=f"ranks-{name}",
            about=about,
            command=[*command, name],
            share=SHARES.get(name, 1.0),
            environment=environment,
        )
        for name, about in CHECKS.items()
    ]


def chosen(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """Return the stages of these names, in the order of the plan, or all if no name is given.

    Raises ValueError for a name that no stage has.
    """
    known = [stage.name for stage in stages]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no stage {', '.join(unknown)}; there are {', '.join(known)}")
    return [stage for stage in stages if not names or stage.name in names]


def _bench(name: str, commit: str | None) -> list[str]:
    words = ["-m", "analysis.bench", name, "--out", "{folder}", "--seconds", "{seconds}"]
    return [*words, "--commit", commit] if commit else words


def _ptxas(*words: str) -> tuple[str, ...]:
    return "-m", "tests.gpu.ptxas", "{folder}", *words


def _on_device() -> dict[str, str]:
    """Let Triton compile for the device, and all stages share what is compiled; make cuBLAS deterministic.

    The cache is no part of the results, which it would outweigh.
    """
    return {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(CACHE), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
