"""One session: single-threaded torch, fresh memory filled with NaN, and rank processes ended at the close."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.ranks import close_pool


@pytest.fixture(scope="session", autouse=True)
def session_settings() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    close_pool()
