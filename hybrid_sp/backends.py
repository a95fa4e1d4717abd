"""Which implementation an operator runs: by device and capability, never by what can be imported, and said once.

    linear_attention    torch, everywhere; triton, our kernels
    delta_rule          torch, everywhere; fla, the passes of fla-core
    softmax_attention   torch, everywhere (on CUDA its flash kernels); flash_attn, the package of that name

The choice never changes the mathematics. A package that the choice needs and that is missing is an error that says what
to install, or that backend="torch" does without.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = {
    "linear_attention": ("torch", "triton"),
    "delta_rule": ("torch", "fla"),
    "softmax_attention": ("torch", "flash_attn"),
}
INSTALL = {"triton": "triton", "fla": "fla-core", "flash_attn": "flash-attn"}  # the package of a backend
OLDEST = (8, 0)  # compute capability
DTYPES = {
    "triton": (torch.bfloat16, torch.float16, torch.float32),
    "fla": (torch.bfloat16, torch.float16),
    "flash_attn": (torch.bfloat16, torch.float16),
}
WIDEST = 256  # key and value dim of the kernels


def select_backend(operator: str, requested: str, x: Tensor, *widths: int, only_torch: str = "") -> str:
    """The backend of one call: `requested`, or for "auto" what suits the device and dtype of x and the key and value
    dims; `only_torch` says why no other has the form that this call asks for. On a CPU "auto" is torch; elsewhere it
    says on stderr what it chooses, every choice once per process. Raises ValueError for a backend that the operator
    does not have, or that cannot run this call."""
    names = BACKENDS[operator]
    if requested not in ("auto", *names):
        raise ValueError(f"{operator}: backend must be one of {('auto', *names)}, got {requested!r}")
    if requested == "torch" or (requested == "auto" and x.device.type == "cpu"):
        return "torch"
    other = names[1]
    why_not = only_torch or _unfit(other, x.device, x.dtype, max(widths))
    if requested == "auto":
        choice = "torch" if why_not or operator == "softmax_attention" else other
        _say(operator, choice, f"{other} {why_not}" if why_not else "")
        return choice
    if why_not:
        raise ValueError(f'{operator}: backend="{other}" {why_not}; use backend="torch" or "auto"')
    return other


@contextmanager
def needs(backend: str) -> Iterator[None]:
    """Around the import of what a backend runs: if that fails, ImportError says what to install or to pass."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'backend="{backend}" needs the package {INSTALL[backend]}, which cannot be imported ({error}); install it '
            f'(pip install {INSTALL[backend]}), or pass backend="torch"'
        ) from error


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unfit(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Why a backend other than torch cannot run such tensors; empty if it can."""
    simulated = name == "triton" and interpreted()
    if device.type != "cuda" and not (simulated and device.type == "cpu"):
        return f"needs a CUDA device, got {device.type}"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < OLDEST:
        wanted, got = (".".join(map(str, pair)) for pair in (OLDEST, capability))
        return f"needs compute capability {wanted} or newer, got {got}"
    if dtype not in DTYPES[name]:
        return f"takes {', '.join(str(d) for d in DTYPES[name])}, got {dtype}"
    if width > WIDEST:
        return f"takes key and value dims up to {WIDEST}, got {width}"
    return ""


@functools.cache
def _say(operator: str, choice: str, reason: str) -> None:
    print(f"hybrid_sp: {operator} runs on {choice}" + (f" ({reason})" if reason else ""), file=sys.stderr)
