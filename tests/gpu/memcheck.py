"""Every kernel once at small odd shapes, forward and backward, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.gpu.memcheck
"""

from __future__ import annotations

import torch

from tests.gpu.linear import Problem

DOCUMENTS = (0, 1, 70, 131)


def problems() -> list[Problem]:
    """Odd lengths and widths, every decay, and every form."""
    small = {"length": 131, "heads": 2, "groups": 1, "key": 37, "value": 53}
    found = [Problem(decay=decay, states=True, **small) for decay in (None, "fixed", "scalar", "vector")]
    found += [Problem(decay=decay, batch=1, documents=DOCUMENTS, spans=2, **small) for decay in ("scalar", "vector")]
    found += [Problem(decay="vector", bonus=True, **small), Problem(decay="scalar", normalize=True, **small)]
    return [*found, Problem(decay="scalar", dtype=torch.float32, **small)]


def main(device: torch.device) -> None:
    for problem in problems():
        for name, value in problem.results(problem.inputs(0, device), "triton").items():
            assert torch.isfinite(value).all(), f"{problem}: {name}"
        print(problem, flush=True)


if __name__ == "__main__":
    main(torch.device("cuda"))
