"""The provenance of a benchmark: command, commit, versions and machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from analysis.bench.device import device_facts

ROOT = Path(__file__).parents[2]


def provenance(commit: str | None = None) -> dict[str, Any]:
    """Command, commit (as told, where the tree is a copy without git), versions, machine and time."""
    return {
        "command": " ".join(["python -m analysis.bench", *sys.argv[1:]]),
        "commit": commit or _git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **_installed()},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "device": device_facts(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git(*arguments: str) -> str:
    """What git says of this tree; nothing where there is no git, or where this is no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def _installed() -> dict[str, str]:
    """Versions of the kernels' packages and of the peers that are installed."""
    versions = {}
    for package in ("triton", "fla-core", "flash-attn", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
