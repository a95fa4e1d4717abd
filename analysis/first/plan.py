"""The plan of a first run: what is checked and measured on one device, and on several, in order of worth.

Checks live in `tests/gpu`; each is a program with an exit code. `share` is set so that ten minutes suffice on an H200.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.first.stages import Stage

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_device.py", "--durations", "10")
SPREAD = "--numprocesses=8"  # most of the time goes into compiling kernels
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


def one_device(out: Path) -> list[Stage]:
    """Return the stages of one device."""
    spread = [SPREAD] if importlib.util.find_spec("xdist") else []
    on_device = _on_device(out)

    def stage(name: str, about: str, share: float, *words: str, until: str = "") -> Stage:
        command = [sys.executable, *words]
        return Stage(name=name, about=about, command=command, share=share, environment=on_device, until=until)

    return [
        stage("machine", "versions, drivers, devices", 10, "-m", "torch.utils.collect_env"),
        stage("compile", "kernels of all contenders", 0, "-m", "analysis.bench.gpu.compilation", until="tune"),
        stage("correct", "every backend against fp64", 160, *PYTEST, *spread, "-k", "not memcheck"),
        stage("syncs", "no mixer stops the host, zigzag and packed", 40, "-m", "tests.gpu.syncs"),
        stage("memcheck", "small odd shapes under compute-sanitizer", 60, "-m", "tests.gpu.memcheck", "--watched"),
        stage("ptxas", "the same kernels by two ptxas", 70, "-m", "tests.gpu.ptxas", "{folder}"),
        stage("tune", "five launch parameters of each kernel", 110, *_bench("tune")),
        stage("kernels", "speed beside fla-core and flash attention", 130, *_bench("kernels")),
    ]


def several_ranks(out: Path, ranks: int, device: str) -> list[Stage]:
    """Return the ten checks on several ranks, with a device each."""
    environment = _on_device(out) if device == "cuda" else {}
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


def _bench(name: str) -> tuple[str, ...]:
    return ("-m", "analysis.bench", name, "--out", "{folder}", "--seconds", "{seconds}")


def _on_device(out: Path) -> dict[str, str]:
    """Let Triton compile for the device, and all stages share what is compiled; make cuBLAS deterministic."""
    cache = str((out / "cache").absolute())
    return {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
