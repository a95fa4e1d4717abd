"""The mesh of devices, dp x sp, and how a run cuts its sequences over the axis sp."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import collectives
from .exchange import EXCHANGES
from .layout import LAYOUTS, Shard

# Choices of the public API that are not built yet.
_PLANNED = {"linear": ("ring", "pipeline", "doubling", "auto"), "softmax": ("ring", "ulysses", "megatron")}


def init_mesh(dp: int = 1, sp: int = 1, device: str = "cpu", timeout: timedelta = timedelta(minutes=10)) -> DeviceMesh:
    """Mesh with the axes "dp" (replicas of the model) and "sp" (pieces of a sequence); sp ranks are neighbours.

    Starts the process group where none exists: of torchrun's processes, or of this process alone. gloo serves the CPU,
    nccl CUDA. A collective that takes longer than `timeout` fails on every rank that waits for it.

    Raises ValueError if the number of processes is not dp x sp.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if min(dp, sp) < 1 or dp * sp != world:
        raise ValueError(f"dp x sp must be the number of processes: got dp={dp}, sp={sp} for {world} processes")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    ranks = torch.arange(world).view(dp, sp)
    rows, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    columns, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout)
    return DeviceMesh.from_group([columns, rows], device, mesh=ranks, mesh_dim_names=("dp", "sp"))


def whole_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of the mesh, dp and sp together."""
    if mesh.size() != dist.get_world_size():
        raise ValueError(f"the mesh has {mesh.size()} ranks and the world {dist.get_world_size()}")
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@dataclass(frozen=True)
class SequenceParallel:
    """How sequences are cut over the ranks of a group, and how the layers communicate. Made once per run.

    group     a process group (`mesh["sp"].get_group()`), or None for one device
    layout    "contiguous": rank r owns span r of P. "zigzag": it owns spans r and 2P-1-r of 2P, which gives every
              rank the same work in causal softmax attention
    linear    exchange of states: "all_gather" is LASP-2 (arXiv 2502.07563)
    softmax   exchange of keys and values: "all_gather"
    overlap   compute while collectives are in flight; False waits at once (for ablations; the results are bit-equal)
    check     compare a header on all ranks before each collective; costs a small collective, on in tests
    """

    group: Any
    layout: str = "contiguous"
    linear: str = "all_gather"
    softmax: str = "all_gather"
    kv_heads_per_gather: int | None = None
    keep_kv: bool = True
    overlap: bool = True
    check: bool = False

    def __post_init__(self) -> None:
        allowed = {"layout": LAYOUTS, "linear": tuple(EXCHANGES), "softmax": ("all_gather",)}
        for name, choices in allowed.items():
            value = getattr(self, name)
            if value in _PLANNED.get(name, ()):
                raise NotImplementedError(f'SequenceParallel({name}="{value}") is not built yet; use {choices}')
            if value not in choices:
                raise ValueError(f"SequenceParallel.{name} must be one of {choices}, got {value!r}")
        if self.kv_heads_per_gather is not None:
            raise NotImplementedError("SequenceParallel(kv_heads_per_gather=...) is not built yet; leave it None")
        if not self.keep_kv:
            raise NotImplementedError("SequenceParallel(keep_kv=False) is not built yet; leave it True")

    @property
    def rank(self) -> int:
        return collectives.rank(self.group)

    @property
    def size(self) -> int:
        return collectives.size(self.group)

    def shard(self, length: int, cu_seqlens: Sequence[int] | None = None) -> Shard:
        """This rank's part of a sequence of `length` tokens. Made once per batch.

        cu_seqlens: bounds of packed documents as host ints, 0 ... length, strictly rising; None: the sequence is one
        document. Raises ValueError for other bounds, and if the sequence has fewer tokens than spans.
        """
        if cu_seqlens is None:
            return Shard(self, length)
        try:
            return Shard(self, length, tuple(operator.index(bound) for bound in cu_seqlens))
        except TypeError:
            raise ValueError(f"cu_seqlens must be whole numbers, got {cu_seqlens!r}") from None
