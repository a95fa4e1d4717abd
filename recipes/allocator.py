"""The C library's allocator, set for programs that make and free large tensors over and over."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed CPU tensors for the next ones, instead of giving it back.

    glibc asks the system for every block over 32 MiB and gives it back when it is freed, so that each tensor of a long
    sequence costs a page fault for every 4 KiB. At 32K tokens a mixer is 1.4 to 1.7 times as fast without, at a peak of
    up to 1.6 times the memory. For a program to call at its start; the engine does not change its host's allocator.
    Returns whether it could be set: only with glibc.
    """
    name = ctypes.util.find_library("c")
    if not sys.platform.startswith("linux") or name is None:
        return False
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
