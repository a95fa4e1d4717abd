"""The process groups: ranks, sizes, devices, and further groups of the same ranks. `None` is one device."""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None

# Further groups of the same ranks, by group and backend. They end with their group.
_twins: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, dist.ProcessGroup]] = weakref.WeakKeyDictionary()


def rank(group: Group) -> int:
    """Return this process's rank in the group."""
    return 0 if group is None else dist.get_rank(group)


def size(group: Group) -> int:
    """Count the ranks in the group."""
    return 1 if group is None else dist.get_world_size(group)


def device(group: Group) -> torch.device:
    """Return the device of the tensors that a group's ranks send: this process's GPU with NCCL, else the CPU."""
    return torch.device("cuda" if group is not None and "nccl" in str(dist.get_backend_config(group)) else "cpu")


def message_group(group: Group) -> dist.ProcessGroup:
    """Return the group's twin for messages.

    If collectives and messages shared a communicator, two ranks could order them differently.
    """
    return _twin(group, str(dist.get_backend_config(group)))


def cpu_group(group: Group) -> dist.ProcessGroup:
    """Return the group, or its twin on gloo if the group cannot send tensors on the CPU."""
    assert group is not None
    return group if torch.device("cpu") in group._device_types else _twin(group, "gloo")


def _twin(group: Group, backend: str) -> dist.ProcessGroup:
    """Return another group of the same ranks. It is made the first time that all of them ask for it."""
    assert group is not None
    twins = _twins.setdefault(group, {})
    if backend not in twins:
        ranks, limit = dist.get_process_group_ranks(group), timeout(group)
        name = f"{group.group_desc}, twin on {backend}"  # which NCCL's watchdog prints
        options = group_options(backend, limit)
        twins[backend] = dist.new_group(ranks, limit, backend, options, use_local_synchronization=True, group_desc=name)
    return twins[backend]


def timeout(group: Group) -> timedelta:
    """Return the time after which the group's collectives and messages fail."""
    assert group is not None
    limit: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return limit


def group_options(backend: str, timeout: timedelta, ctas: int | None = None) -> Any:
    """Return the options of a new group, a new object for each. NCCL takes at most `ctas` thread blocks.

    NCCL's own stream is the communication stream. It has high priority, so that data that arrives does not queue behind
    kernels that do not need it. This has not run yet: it was written on a machine without NCCL.
    """
    if "nccl" not in backend:
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    if ctas is not None:
        options.config.max_ctas = ctas
    return options


def global_rank(group: Group, rank: int) -> int:
    return dist.get_global_rank(group, rank) if group is not None else rank
