"""One session: torch computes as the options say, fresh memory is filled with NaN, and rank processes end at the close.

Our Triton kernels run on the CPU, in Triton's interpreter. A kernel is made for it, or not, when its file is imported:
so the variable stands before any import of triton, and rank processes inherit it. TRITON_INTERPRET=0 tests a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from tests.support import ranks
from tests.support.arithmetic import Arithmetic


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("arithmetic", "how torch computes, in this process and in those of ranks")
    options.addoption("--threads", type=int, default=1, help="CPU threads of each process")
    options.addoption("--permute", type=int, metavar="SEED", help="sum matrix products in an order drawn by this seed")


@pytest.fixture(scope="session", autouse=True)
def session_settings(pytestconfig: pytest.Config) -> Iterator[None]:
    ranks.arithmetic.update(threads=pytestconfig.option.threads, permute=pytestconfig.option.permute)
    Arithmetic(**ranks.arithmetic).apply()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    ranks.close_pool()
