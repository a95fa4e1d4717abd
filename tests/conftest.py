"""One session: single-threaded torch, fresh memory filled with NaN, and rank processes ended at the close.

Our Triton kernels run on the CPU, in Triton's interpreter. A kernel is made for it, or not, when its file is imported:
so the variable stands before any import of triton, and rank processes inherit it. TRITON_INTERPRET=0 tests a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from tests.support.ranks import close_pool


@pytest.fixture(scope="session", autouse=True)
def session_settings() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    close_pool()
