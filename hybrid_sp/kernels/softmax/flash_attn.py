"""The softmax attention of one block by the flash-attn package, with the conventions of `attend.py`.

    version 2   flash-attn 2.7 and newer   `flash_attn.flash_attn_interface`   compute capability 8.0 and newer
    version 4   flash-attn-4               `flash_attn.cute.interface`         9.0 and newer (no backward before)

Both can be installed together. On 9.x to 11.x version 4 comes first, elsewhere version 2. This file calls the two
functions inside each version's own autograd node. The node itself would not do: backward needs the output and lse of
the whole attention, not of this block. The functions are private: `tests/hybrid_sp/kernels/test_flash.py` checks their
argument names and results, and compares them with the installed version.

Tensors are [B,T,H,D], and lse is [B,H,T] in fp32 and natural units. Key heads may be fewer than query heads, without a
copy. causal needs two sequences of one length.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Grads, fit, flash_dim


class Package(NamedTuple):
    """The interface of one version: `dim` returns the columns that it works on, `forward` o and lse [B,H,T], `backward`
    the gradients."""

    name: str
    dim: Callable[[int], int]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Grads]


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Compute o [B,T,H,D] and lse [B,T,H] of q [B,T,H,D] over k, v [B,S,G,D], in bf16 or fp16."""
    used, dim = package(q), q.shape[-1]
    o, lse = used.forward(*(fit(x, used.dim(dim)) for x in (q, k, v)), causal, scale)
    rows = q.shape[0], q.shape[2], q.shape[1]
    if lse.shape != rows or o.shape[:-1] != q.shape[:-1]:
        got = f"o {tuple(o.shape)} and lse {tuple(lse.shape)}, not lse {rows}"
        raise RuntimeError(f'softmax_attention: {used.name} returned {got}: unknown to us; use backend="torch"')
    return o[..., :dim], lse.transpose(1, 2)


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float) -> Grads:
    """Compute dq, dk, dv of one block, from the output o, its gradient and the lse of the whole attention."""
    used, dim = package(q), q.shape[-1]
    blocks = (fit(x, used.dim(dim)) for x in (do, q, k, v, o))
    dq, dk, dv = used.backward(*blocks, lse.transpose(1, 2).contiguous(), causal, scale)
    return dq[..., :dim], dk[..., :dim], dv[..., :dim]


def package(x: Tensor) -> Package:
    """Return the version for the device of x. Raise ImportError if no version that can train there is installed."""
    return _package(capability(x))


def capability(x: Tensor) -> tuple[int, int]:
    """Return the compute capability of the device of x."""
    return torch.cuda.get_device_capability(x.device)


@functools.cache
def _package(chip: tuple[int, int]) -> Package:
    ways: dict[str, Callable[[tuple[int, int]], Package]] = {"flash-attn-4": _four, "flash-attn": _two}
    if chip < (9, 0):
        del ways["flash-attn-4"]
    order = sorted(ways, reverse=(9, 0) <= chip < (12, 0))
    missing = []
    for name in order:
        try:
            return ways[name](chip)
        except ImportError as error:
            missing.append(f"{name}: {error}")
    where = f"on compute capability {chip[0]}.{chip[1]}"
    raise ImportError(
        f'softmax_attention: backend="flash_attn" {where} needs {" or ".join(order)}: pip install {order[0]}, '
        f'or use backend="torch" ({"; ".join(missing)})'
    )


def _two(chip: tuple[int, int]) -> Package:
    version = importlib.metadata.version("flash-attn")  # if it is absent, this raises an ImportError too
    if [int(part) for part in version.split(".")[:2]] < [2, 7]:
        raise ImportError(f"{version} is older than 2.7")
    from flash_attn import flash_attn_interface as two

    whole: dict[str, Any] = {
        "dropout_p": 0.0,
        "softcap": 0.0,
        "alibi_slopes": None,
        "window_size_left": -1,
        "window_size_right": -1,
    }

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        o, lse, *_ = two._flash_attn_forward(
            q=q, k=k, v=v, softmax_scale=scale, causal=causal, return_softmax=False, **whole
        )
        return o, lse

    def run_backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> Grads:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        two._flash_attn_backward(
            dout=do,
            q=q,
            k=k,
            v=v,
            out=o,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **whole,
        )
        return dq, dk, dv

    return Package(f"flash-attn {version}", flash_dim, run, run_backward)


def _four(chip: tuple[int, int]) -> Package:
    version = importlib.metadata.version("flash-attn-4")
    from flash_attn.cute import interface as four

    lacking = {"softmax_scale", "causal", "return_lse"} - {*inspect.signature(four._flash_attn_fwd).parameters}
    if lacking:  # flash-attn 2.8 brings an older one, which may overwrite it
        raise ImportError(
            f"its _flash_attn_fwd takes no {sorted(lacking)}: install flash-attn-4 again, after flash-attn"
        )

    # These dims are tested upstream. From compute capability 10.0 on, it supports none between 128 and 256.
    sizes = (64, 96, 128, 192, 256) if chip < (10, 0) else (64, 128, 256)

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        o, lse, *_ = four._flash_attn_fwd(q=q, k=k, v=v, softmax_scale=scale, causal=causal, return_lse=True)
        return o, lse

    def run_backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> Grads:
        dq, dk, dv, *_ = four._flash_attn_bwd(
            q=q,
            k=k,
            v=v,
            out=o,
            dout=do,
            lse=lse,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv

    return Package(f"flash-attn-4 {version}", lambda dim: min(s for s in sizes if s >= dim), run, run_backward)
