"""The choice of an operator's implementation, by device, dtype and size; "auto" prints each of its choices once.

    linear_attention    torch, everywhere; triton, our kernels
    delta_rule          torch, everywhere; fla, the passes of fla-core
    softmax_attention   torch, everywhere (on CUDA its flash kernels); flash_attn, the package of that name
    latent_attention    the same

The choice never changes the mathematics, and never depends on the packages that happen to be installed. If the chosen
backend's package is missing, the error names it, and names backend="torch" as the way without.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = {
    "linear_attention": ("torch", "triton"),
    "delta_rule": ("torch", "fla"),
    "softmax_attention": ("torch", "flash_attn"),
    "latent_attention": ("torch", "flash_attn"),
}
INSTALL = {"triton": "triton", "fla": "fla-core", "flash_attn": "flash-attn"}  # the package that each backend needs
OLDEST = (8, 0)  # least compute capability of the kernels
# On Hopper 3.4 ... 3.7.0 miscompile chained products, and fla-core refuses them. torch 2.11 needs 3.6.0 exactly.
TRITON_ON_HOPPER = (3, 7, 1)
ANY_TRITON = "HYBRID_SP_ANY_TRITON"
DTYPES = {
    "triton": (torch.bfloat16, torch.float16, torch.float32),
    "fla": (torch.bfloat16, torch.float16),
    "flash_attn": (torch.bfloat16, torch.float16),
}
WIDEST = 256  # largest key and value dim of the kernels


def select_backend(operator: str, requested: str, x: Tensor, *widths: int, only_torch: str = "") -> str:
    """Choose the backend of one call: `requested`, or for "auto" one that can run it.

    "auto" looks at the device and dtype of x and at the key and value dims. On a CPU it is torch. Elsewhere it prints
    each choice to stderr once per process. `only_torch` is the reason why only torch can run this call, if there is
    one.

    Raises ValueError for a backend that the operator does not have, or that cannot run this call.
    """
    names = BACKENDS[operator]
    if requested not in ("auto", *names):
        raise ValueError(f"{operator}: backend must be one of {('auto', *names)}, got {requested!r}")
    if requested == "torch" or (requested == "auto" and x.device.type == "cpu"):
        return "torch"
    other = names[1]
    why_not = only_torch or _unfit(other, x.device, x.dtype, max(widths))
    if requested == "auto":
        choice = "torch" if why_not or other == "flash_attn" else other
        _say(operator, choice, f"{other} {why_not}" if why_not else "")
        return choice
    if why_not:
        raise ValueError(f'{operator}: backend="{other}" {why_not}; use backend="torch" or "auto"')
    return other


@contextmanager
def needs(backend: str) -> Iterator[None]:
    """Guard the import of a backend's package: if it fails, ImportError says what to install or to pass."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'backend="{backend}" needs the package {INSTALL[backend]}, which cannot be imported ({error}); install it '
            f'(pip install {INSTALL[backend]}), or pass backend="torch"'
        ) from error


@functools.cache
def triton_runs_on(device: torch.device) -> bool:
    """Tell whether our kernels can run on a device, where no backend was asked for."""
    if importlib.util.find_spec("triton") is None:
        return False
    return interpreted() if device.type == "cpu" else torch.cuda.get_device_capability(device) >= OLDEST


def check_triton(device: torch.device) -> None:
    """Raise ImportError if this is a Hopper device, for which the installed Triton miscompiles products.

    HYBRID_SP_ANY_TRITON=1 in the environment lets it run, for the tests that find out.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if not hopper or os.environ.get(ANY_TRITON) == "1":
        return
    import triton

    version = tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:3])
    if version < TRITON_ON_HOPPER:
        raise ImportError(
            f'backend="triton" needs triton {".".join(map(str, TRITON_ON_HOPPER))} or newer on compute capability 9.0, '
            f"where older ones miscompile, got {triton.__version__}; install torch 2.13, which comes with it, or pass "
            f'backend="torch" ({ANY_TRITON}=1 runs it all the same, and make gpu-test shows if it is wrong)'
        )


def interpreted() -> bool:
    """Tell whether Triton kernels run in its interpreter, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unfit(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Return the reason why a backend other than torch cannot run such tensors; empty if it can."""
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
