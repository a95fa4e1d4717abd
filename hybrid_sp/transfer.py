"""The copy of tables from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor

PINNED = {"cuda"}  # devices that copy from pinned memory while the host goes on


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor of the host to a device. The host of a GPU does not wait for the copy."""
    if torch.device(device).type not in PINNED:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
