"""Softmax attention, the delta rule and the mixers on one device, held against the torch path in fp64 on the CPU."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hybrid_sp as hsp
import layers.config  # noqa: F401 (registers the mixers)
from layers.moe import MoE, MoEConfig
from layers.registry import BlockContext, mixer_spec
from tests.support.oracle import relative

Tensors = dict[str, Tensor]
SOFTMAX = {  # by name: heads of queries and of keys, window, documents as shares of the sequence
    "causal": (4, 4, None, ()),
    "grouped": (4, 2, None, ()),
    "window": (4, 2, 37, ()),
    "documents": (4, 2, None, (0.1, 0.7)),
    "sinks": (4, 2, None, ()),
    "narrow values": (4, 2, None, ()),
}


@contextmanager
def two_configurations() -> Iterator[None]:
    """Of each of fla-core's kernels two configurations are enough to see that it is right; all of them take minutes."""
    if importlib.util.find_spec("fla") is None:
        yield
        return
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autotuner, "prune_configs", lambda self, kwargs: prune(self, kwargs)[:2])
        yield


def _results(call: Callable[..., Tensor], x: Tensors) -> Tensors:
    leaves = {name: value.detach().requires_grad_() for name, value in x.items()}
    o = call(**leaves)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad(o, list(leaves.values()), weights.to(o))
    return {"o": o.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def _errors(call: Callable[..., Tensor], truth: Callable[..., Tensor], x: Tensors) -> dict[str, float]:
    want = _results(truth, {name: value.cpu().double() for name, value in x.items()})
    return {name: relative(got.cpu(), want[name]) for name, got in _results(call, x).items()}


def check_softmax(kind: str, backend: str, device: torch.device, dtype: torch.dtype, length: int, width: int) -> None:
    """At most twice the error of torch's own scaled_dot_product_attention on this device, where it has the mask."""
    heads, groups, window, shares = SOFTMAX[kind]
    documents = [0, *(int(share * length) for share in shares), length] if shares else None
    shard = hsp.SequenceParallel(None).shard(length, documents)
    make = torch.Generator().manual_seed(0)
    sizes = {"q": heads, "k": groups, "v": groups}
    x = {n: torch.randn(1, length, size, width, generator=make).to(device, dtype) for n, size in sizes.items()}
    peer_x = dict(x)
    if kind == "sinks":
        x["sinks"] = torch.randn(heads, generator=make).to(device)
    if kind == "narrow values":
        x["v"] = x["v"][..., : width // 2 + 1].contiguous()

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, which: str = backend) -> Tensor:
        return hsp.softmax_attention(q, k, v, sinks=sinks, window=window, shard=shard, backend=which)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hsp.softmax_attention(q, k, v, backend="torch")

    found = _errors(ours, lambda **given: ours(**given, which="torch"), x)
    peer = _errors(plain, causal, peer_x)
    peer["dsinks"] = peer["o"]  # torch's has none
    print(f"softmax {kind} by {backend}", {name: f"{found[name]:.2g} / {peer[name]:.2g}" for name in found})
    for name, error in found.items():
        assert error <= max(2 * peer[name], 1e-6), f"{kind}, {name}: {error:.3g}, torch's own has {peer[name]:.3g}"


def check_mixer(name: str, device: torch.device, length: int, dim: int) -> None:
    """A mixer as a module in fp32: output and every gradient, within 1e-4 of fp64 on the CPU."""
    context = BlockContext(dim=dim, heads=4, kv_heads=4, layer=0, depth=2, norm_eps=1e-6, rope_base=10000.0)
    torch.manual_seed(0)
    mixer = mixer_spec(name).build(context)
    assert isinstance(mixer, nn.Module)
    _check_module(name, mixer, device, length, dim)


def check_experts(device: torch.device, length: int, dim: int) -> None:
    """A mixture of experts in fp32, by torch's grouped product: output and every gradient, within 1e-4."""
    moe = MoE(MoEConfig(experts=4, active=2, shared=dim), dim, dim, depth=2)
    make = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in moe.parameters():
            weight.copy_(torch.randn(weight.shape, generator=make) / dim**0.5)
    _check_module("experts", moe, device, length, dim)


def _check_module(name: str, mixer: nn.Module, device: torch.device, length: int, dim: int) -> None:
    x = torch.randn(1, length, dim, generator=torch.Generator().manual_seed(1))

    def run(layer: nn.Module, x: Tensor) -> Tensors:
        return _results(lambda x, **_: layer(x)[0], {"x": x}) | {
            f"d{key}": grad
            for (key, _), grad in zip(
                layer.named_parameters(),
                torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())),
                strict=True,
            )
        }

    want = run(copy.deepcopy(mixer).double(), x.double())
    for key, got in run(mixer.to(device), x.to(device)).items():
        assert (error := relative(got.cpu(), want[key])) <= 1e-4, f"{name}, {key}: {error:.3g}"


def check_delta(
    decay: str | None, backend: str, device: torch.device, dtype: torch.dtype, width: int, length: int
) -> None:
    """fla-core's kernels round the inverse and the states to the dtype, so the bounds are its own tests': 1e-2 of o and
    of the gradients of tokens, 2e-2 of those of the gates."""
    make = torch.Generator().manual_seed(0)
    shape = (1, length, 2, width)
    q, k, v, gate = (torch.randn(shape, generator=make) for _ in range(4))
    x = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v}
    x = {name: value.to(device, dtype) for name, value in x.items()}
    x["beta"] = gate[..., 0].sigmoid().to(device)
    if decay is not None:
        g = F.logsigmoid(gate) / 4
        x["log_decay"] = (g if decay == "vector" else g[..., 0]).to(device)

    def call(which: str) -> Callable[..., Tensor]:
        return lambda q, k, v, **gates: hsp.delta_rule(q, k, v, **gates, backend=which)

    found = _errors(call(backend), call("torch"), x)
    print(f"delta, decay {decay}, by {backend}", {name: f"{error:.2g}" for name, error in found.items()})
    for name, error in found.items():
        assert error <= (1e-2 if name in ("o", "dq", "dk", "dv") else 2e-2), f"decay {decay}, {name}: {error:.3g}"
