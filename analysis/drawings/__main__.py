"""Draw ``imports`` (hybrid_sp/imports.png) and ``hybrid`` (analysis/results/figures/hybrid.png) of this checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.drawings import hybrid, imports

ROOT = Path(__file__).parents[2]
DRAWINGS = {
    "imports": (imports.draw, "hybrid_sp/imports.png"),
    "hybrid": (hybrid.draw, "analysis/results/figures/hybrid.png"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.drawings", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(DRAWINGS)}; both if none is given")
    parser.add_argument("--out", type=Path, default=ROOT, help="the folder to write into, instead of this checkout")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in DRAWINGS]:
        parser.error(f"unknown drawing {', '.join(unknown)}; known: {', '.join(DRAWINGS)}")
    for name in options.names or DRAWINGS:
        draw, place = DRAWINGS[name]
        file = options.out / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(draw().png())
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
