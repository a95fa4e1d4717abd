"""Describe the origin of a result: commit, changes, versions, machine and command.

Benchmarks run where omegaconf and wandb are missing, so this file imports neither.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def git(*arguments: str) -> str | None:
    """Ask git about the checkout of this file; return None without git or a checkout."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """Return the hash of the current commit, if there is one."""
    return (git("rev-parse", "HEAD") or "").strip() or None


def diff() -> str:
    """Return the changes of tracked files since the commit, as a patch."""
    return git("diff", "HEAD") or ""


def untracked() -> list[str]:
    """List the new files that git neither tracks nor ignores."""
    return (git("ls-files", "--others", "--exclude-standard") or "").splitlines()


def is_modified() -> bool:
    """Tell whether any file differs from the commit, new files included."""
    return bool(git("status", "--porcelain"))


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of Python, torch (with its build) and ``packages``; None: not installed."""
    own = {"python": platform.python_version(), "torch": torch.__version__}
    return own | {name: _version(name) for name in packages}


def machine() -> dict[str, Any]:
    """Return the system and its number of CPUs."""
    return {"system": platform.platform(), "cpus": os.cpu_count()}


def command() -> str:
    """Return the command that started this process, up to the order of torchrun's own options."""
    words = sys.orig_argv[1:]
    module = words[words.index("-m") :] if "-m" in words else words
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    return shlex.join((["torchrun", "--nproc-per-node", processes] if processes else ["python"]) + module)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
