"""Set the C library's allocator for programs that create and free large tensors again and again."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed CPU tensors for the next ones, instead of returning it.

    glibc asks the system for every block over 32 MiB and returns it when it is freed. Each tensor of a long sequence
    then costs a page fault for every 4 KiB. Without these faults, at 32K tokens, a mixer is 1.4 to 1.7 times as fast.
    The peak of memory rises to up to 1.6 times. Call this at the start of a program; the engine does not change its
    host's allocator. Return True if it could be set, which needs glibc.
    """
    name = ctypes.util.find_library("c")
    if not sys.platform.startswith("linux") or name is None:
        return False
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
