"""The mesh of devices, dp x sp, and how a run cuts its sequences over the axis sp."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import collectives
from .agreement import Agreement
from .collectives import Link
from .exchange import EXCHANGES
from .layout import LAYOUTS, Shard

KINDS = ("linear", "softmax", "conv")  # of layers that communicate
CHECKS = ("sequence", "calls", False)
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for every process

# Strategies that are no exchange of states or keys, but another form of the operator.
BASELINES = {"linear": ("ulysses", "megatron", "ring_attention"), "softmax": ("ring", "ulysses", "megatron")}


def init_mesh(dp: int = 1, sp: int = 1, device: str = "cpu", timeout: timedelta = timedelta(minutes=10)) -> DeviceMesh:
    """Mesh with the axes "dp" (replicas of the model) and "sp" (pieces of a sequence); sp ranks are neighbours.

    Starts the process group where none exists: of torchrun's processes, or of this process alone where neither RANK nor
    a WORLD_SIZE above 1 is set. gloo serves the CPU, nccl CUDA. A collective that takes longer than `timeout` fails on
    every rank that waits for it.

    Raises ValueError if the number of processes is not dp x sp, and if a launcher's variables are not all set.
    """
    world = dist.get_world_size() if dist.is_initialized() else _processes()
    if min(dp, sp) < 1 or dp * sp != world:
        raise ValueError(f"dp x sp must be the number of processes: got dp={dp}, sp={sp} for {world} processes")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        options: dict[str, Any] = {"timeout": timeout, "pg_options": collectives.group_options(backend, timeout)}
        if os.environ.get("RANK"):
            dist.init_process_group(backend, **options)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    ranks = torch.arange(world).view(dp, sp)
    groups = []
    for members in (ranks.tolist(), ranks.T.tolist()):
        own = collectives.group_options(str(dist.get_backend_config()), timeout)
        groups.append(dist.new_subgroups_by_enumeration(members, timeout=timeout, pg_options=own)[0])
    rows, columns = groups
    return DeviceMesh.from_group([columns, rows], device, mesh=ranks, mesh_dim_names=("dp", "sp"))


def _processes() -> int:
    """How many a launcher has started; ValueError unless it has told each of them all that it needs to know."""
    found = {name: os.environ[name] for name in LAUNCHER if os.environ.get(name)}
    if "RANK" not in found and found.get("WORLD_SIZE", "1") == "1":
        return 1
    told = " ".join(f"{name}={value}" for name, value in found.items())
    advice = "start with torchrun --nproc-per-node N PROGRAM, which sets all four, or unset RANK and WORLD_SIZE for one"
    if missing := [name for name in LAUNCHER if name not in found]:
        raise ValueError(f"init_mesh: {told} set in the environment, {', '.join(missing)} missing: {advice} process")
    rank, world = found["RANK"], found["WORLD_SIZE"]
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"init_mesh: RANK must be one of 0 to WORLD_SIZE - 1, got {told}: {advice} process")
    return int(world)


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
    linear    exchange of states: "all_gather" is LASP-2 (arXiv 2502.07563), "ring" LASP (2404.02882), "pipeline"
              ZeCO (2507.01004), "doubling" a scan in ceil(log2(spans)) rounds; "auto" is the one of these that is the
              fastest on the link (`exchange.choose`). All give the same results
    softmax   exchange of keys and values: "all_gather" is AllGather-KV (arXiv 2407.21783)
              Baselines, in their original form: "ulysses" (arXiv 2309.14509) and "megatron" (Megatron-SP's volumes) cut
              heads inside the operator, for both; Ring Attention (arXiv 2310.01889) is softmax="ring", and with the
              left product (q k^T) v linear="ring_attention". What they cannot do is refused by the operator
    kv_heads_per_gather   "all_gather" of softmax: key heads that travel at a time, the next in flight while these are
              attended to; None, or more than there are: all. One of 8 needs a third of the memory for what is gathered
    keep_kv   "all_gather" of softmax: keep what was gathered for backward; False gathers it again there
    overlap   compute while collectives are in flight; False waits at once (for ablations; the results are bit-equal).
              Or the kinds of layer that do, of "linear", "softmax" and "conv"
    check     "sequence": all ranks compare, once per shard, what `shard` was given, and these settings: over the CPU,
              launched by `shard` and awaited by its first operator, which raises ValueError on every rank if any
              differ. "calls": also a header before each collective, which costs as many small ones; for tests. False:
              ranks that differ hang, fail or compute with wrong numbers. The ledger counts no comparison
    link      the network for linear="auto"; None measures it
    """

    group: Any
    layout: str = "contiguous"
    linear: str = "all_gather"
    softmax: str = "all_gather"
    kv_heads_per_gather: int | None = None
    keep_kv: bool = True
    overlap: bool | Collection[str] = True
    check: str | bool = "sequence"
    link: Link | None = None

    def __post_init__(self) -> None:
        allowed = {
            "layout": LAYOUTS,
            "linear": (*EXCHANGES, "auto", *BASELINES["linear"]),
            "softmax": ("all_gather", *BASELINES["softmax"]),
            "check": CHECKS,
        }
        for name, choices in allowed.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"SequenceParallel.{name} must be one of {choices}, got {value!r}")
        if not isinstance(self.overlap, bool) and (isinstance(self.overlap, str) or set(self.overlap) - set(KINDS)):
            raise ValueError(
                f"SequenceParallel.overlap must be True, False or a list of kinds of {KINDS}, got {self.overlap!r}"
            )
        heads = self.kv_heads_per_gather
        if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
            raise ValueError(f"SequenceParallel.kv_heads_per_gather must be None or at least 1, got {heads!r}")

    def overlaps(self, kind: str) -> bool:
        """Whether layers of this kind compute while their collectives are in flight."""
        return self.overlap if isinstance(self.overlap, bool) else kind in self.overlap

    @property
    def rank(self) -> int:
        return collectives.rank(self.group)

    @property
    def size(self) -> int:
        return collectives.size(self.group)

    def shard(self, length: int, cu_seqlens: Sequence[int] | None = None) -> Shard:
        """This rank's part of a sequence of `length` tokens. Made once per batch.

        It is collective: every rank of the group calls it, with the same arguments and in the same order among its
        other collectives. With `check` the arguments are compared.

        cu_seqlens: bounds of packed documents as host ints, 0 ... length, never falling; documents may be empty. None:
        the sequence is one document. Raises ValueError for other bounds, and if the sequence has fewer tokens than
        spans.
        """
        bounds: Any = cu_seqlens
        fault: ValueError | None = None
        try:
            bounds = None if cu_seqlens is None else tuple(operator.index(bound) for bound in cu_seqlens)
        except TypeError:
            fault = ValueError(f"cu_seqlens must be whole numbers, got {cu_seqlens!r}")
        alike = {"length": length, "cu_seqlens": bounds, **self._settings}
        agreement = Agreement(alike, self.group) if self.check else None
        try:
            if fault is not None:
                raise fault
            shard = Shard(self, length, bounds, agreement=agreement)
        except ValueError:
            if agreement is not None:
                agreement.require()  # other ranks may accept what they were given, and would wait for this one
            raise
        _ = shard.positions  # now: torch.compile would stop at what a layer that reads them computes first
        return shard

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What all ranks must share."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "group"}
        return settings | {"overlap": [kind for kind in KINDS if self.overlaps(kind)]}
