"""The contenders of the benchmark of kernels: ours with every decay, torch's flash attention, fla-core's kernels."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from analysis.bench.device import linear_backend

FORWARD, BOTH = PASSES = ("forward", "forward + backward")
DECAYS = ("none", "fixed", "scalar", "vector")
LAYERS = 16  # layers of the model; `fixed_decay` returns the decays of its first one

Forms = dict[str, list[Tensor]]  # inputs by the contender's decay


@dataclass(frozen=True, kw_only=True)
class Contender:
    """The operator of a row; `call` takes the inputs of its decay and returns the output."""

    name: str
    decay: str  # one of DECAYS, or "softmax" for an operator without a state
    call: Callable[..., Tensor]
    until: int | None = None  # the longest sequence to run it on
    passes: tuple[str, ...] = PASSES  # those that it can run


def find_contenders(device: torch.device, softmax_until: int) -> tuple[list[Contender], list[str]]:
    """Return every contender that can run on the device, ours first, and a note on the others."""
    ours = [Contender(name=f"ours, {decay}", decay=decay, call=_ours(decay)) for decay in DECAYS]
    flash = Contender(name="torch flash attention", decay="softmax", call=_softmax, until=softmax_until)
    if missing := _fla_missing(device):
        return [*ours, flash], [f"skipped: {missing}"]
    return [*ours, flash, *fla_contenders()], []


def _ours(decay: str) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
        if decay == "fixed":
            g = fixed_decay(v.shape[2], v.device)
        o = hsp.linear_attention(q, k, v, log_decay=g, backend=linear_backend())
        assert isinstance(o, Tensor)
        return o

    return call


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.device.type == "cuda" else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def draw_inputs(heads: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Forms, Tensor]:
    """Draw random leaves for every decay, with the same q, k and v, and the gradient of the output."""
    make = torch.Generator(device).manual_seed(0)
    q, k, v, do = (torch.randn(1, length, heads, width, dtype=dtype, device=device, generator=make) for _ in range(4))
    gate = F.logsigmoid(torch.randn(1, length, heads, width, device=device, generator=make)) / 16  # as GLA starts
    plain = [leaf.requires_grad_() for leaf in (q, k, v)]
    scalar = gate[..., 0].contiguous().requires_grad_()
    forms = dict.fromkeys(("none", "fixed", "softmax"), plain)
    return forms | {"scalar": [*plain, scalar], "vector": [*plain, gate.requires_grad_()]}, do


@functools.cache
def fixed_decay(heads: int, device: torch.device) -> Tensor:
    """Return the log decays [H] of fla-core's chunk_lightning_attn in layer 0 of LAYERS."""
    return -8 / heads * torch.arange(heads, device=device, dtype=torch.float32)


def _fla_missing(device: torch.device) -> str:
    """Return the reason that stops fla-core's kernels from running; empty if they can run."""
    if importlib.util.find_spec("fla") is None:
        return "fla-core is not installed"
    if device.type != "cuda":
        return "fla-core's kernels need a CUDA device"
    try:
        import fla.ops  # noqa: F401
    except Exception as error:  # its import may raise anything on this machine
        return f"fla-core cannot be imported: {type(error).__name__}: {error}"
    return ""


def fla_contenders() -> list[Contender]:
    from fla.ops.gla import chunk_gla
    from fla.ops.lightning_attn import chunk_lightning_attn
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    def first(name: str, decay: str, function: Callable[..., Any], **options: Any) -> Contender:
        return Contender(name=f"fla {name}", decay=decay, call=lambda *inputs: function(*inputs, **options)[0])

    return [
        first("chunk_simple_gla", "scalar", chunk_simple_gla),
        first("chunk_lightning_attn", "fixed", chunk_lightning_attn, layer_idx=0, num_layers=LAYERS),
        first("chunk_gla", "vector", chunk_gla),
        first("chunk_linear_attn", "none", chunk_linear_attn, normalize=False),
    ]
