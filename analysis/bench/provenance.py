"""The origin of a benchmark's numbers."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from analysis.bench.device import allow_any_triton, device_facts
from recipes import provenance as origin

PACKAGES = ("triton", "fla-core", "flash-attn", "transformers")  # our kernels' compiler, and peers


def provenance(commit: str | None = None) -> dict[str, Any]:
    """Record command, versions, machine, time and commit; `commit` names the commit of a copy without git."""
    return {
        "command": " ".join(["python -m analysis.bench", *sys.argv[1:]]),
        "commit": commit or origin.commit(),
        "uncommitted_changes": origin.is_modified(),
        "versions": {name: found for name, found in origin.versions(PACKAGES).items() if found is not None},
        "machine": {**origin.machine(), "load_before": os.getloadavg()[0]},
        "device": device_facts(),
        "note": allow_any_triton(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
