"""The mesh of devices, dp x sp."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .comm import groups

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # the variables that torchrun sets for every process


def init_mesh(
    dp: int = 1,
    sp: int = 1,
    device: str = "cpu",
    timeout: timedelta = timedelta(minutes=10),
    *,
    eager: bool = False,
    gather_ctas: int | None = None,
) -> DeviceMesh:
    """Create the mesh with the axes "dp" (replicas of the model) and "sp" (pieces of a sequence); sp ranks are
    neighbours.

    If no process group exists, this starts one: over torchrun's processes, or over this process alone if RANK is unset
    and WORLD_SIZE is unset or 1. gloo serves the CPU, nccl CUDA. If a collective takes longer than `timeout`, it fails
    on every rank that waits for it.

    On CUDA a process takes the GPU of its LOCAL_RANK, or the only one that it sees. NCCL has two options more, which
    have not been measured yet:

        eager        connect all ranks of a group now, instead of two at their first message. It finds a broken network
                     at once. All messages of a rank then share one stream: `pipeline` gains nothing over `ring`
        gather_ctas  most thread blocks of a collective over sp. A kernel that fills the GPU lets a small collective
                     start earlier; it also carries fewer bytes per second. None: NCCL chooses

    Raises ValueError if the number of processes is not dp x sp, or if a launcher's variables are not all set. It also
    raises ValueError if this process has no GPU of its own, and for options of NCCL without CUDA.
    """
    if device != "cuda" and (eager or gather_ctas is not None):
        raise ValueError(f"init_mesh: eager and gather_ctas are options of NCCL: device must be cuda, got {device}")
    if gather_ctas is not None and gather_ctas < 1:
        raise ValueError(f"init_mesh: gather_ctas must be at least 1, got {gather_ctas}")
    world = dist.get_world_size() if dist.is_initialized() else _processes()
    if min(dp, sp) < 1 or dp * sp != world:
        raise ValueError(f"dp x sp must be the number of processes: got dp={dp}, sp={sp} for {world} processes")
    if device == "cuda":
        torch.cuda.set_device(_gpu(world))  # before anything could open GPU 0 in every process
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        options: dict[str, Any] = {"timeout": timeout, "pg_options": groups.group_options(backend, timeout)}
        if eager:
            options["device_id"] = torch.device("cuda", torch.cuda.current_device())
        if os.environ.get("RANK"):
            dist.init_process_group(backend, **options)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
    ranks = torch.arange(world).view(dp, sp)
    backends = str(dist.get_backend_config())
    (sp_group, _), (dp_group, _) = (
        dist.new_subgroups_by_enumeration(
            members, timeout=timeout, pg_options=groups.group_options(backends, timeout, ctas), group_desc=name
        )
        for name, members, ctas in (("sp", ranks.tolist(), gather_ctas), ("dp", ranks.T.tolist(), None))
    )
    return DeviceMesh.from_group([dp_group, sp_group], device, mesh=ranks, mesh_dim_names=("dp", "sp"))


def _gpu(world: int) -> int:
    """Return the index of this process's GPU. Raises ValueError if LOCAL_RANK does not give one."""
    local, seen = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if seen == 1 or (world == 1 and not local):
        return 0
    if not local:
        raise ValueError(
            f"init_mesh: LOCAL_RANK is not set, so all {world} processes would take GPU 0 of {seen}: start with "
            "torchrun, or set LOCAL_RANK to the process's number on its machine (srun: SLURM_LOCALID)"
        )
    if not (local.isdecimal() and int(local) < seen):
        raise ValueError(f"init_mesh: LOCAL_RANK={local}, but torch sees {seen} GPUs: start one process for each GPU")
    return int(local)


def _processes() -> int:
    """Count the processes that a launcher started: 1 if RANK is unset and WORLD_SIZE is unset or 1.

    Otherwise raises ValueError unless all four variables of `LAUNCHER` are set, and RANK and WORLD_SIZE are valid.
    """
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
    """Return the group of all ranks of the mesh, dp and sp together."""
    if mesh.size() != dist.get_world_size():
        raise ValueError(f"the mesh has {mesh.size()} ranks and the world {dist.get_world_size()}")
    assert dist.group.WORLD is not None
    return dist.group.WORLD
