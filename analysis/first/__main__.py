"""Check and measure everything on a device that is there for the first time: ``python -m analysis.first``.

It needs torch 2.11 or newer with its Triton, einops and pytest, and no omegaconf or wandb. Whatever ends it, what is
done by then is in the report. Exit code 0 means that every stage passed; one that this machine cannot run has not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from analysis.first.plan import chosen, one_device, several_ranks
from analysis.first.stages import Run, end_on_signals
from recipes import provenance


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, print a line for each, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.first", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="STAGE", help="a stage of the plan; default: all of them")
    parser.add_argument("--ranks", type=int, default=1, help="run the checks on so many ranks (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of the ranks (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-first"), help="the folder of results (%(default)s)")
    parser.add_argument("--seconds", type=float, default=580.0, help="the time for everything (%(default)s)")
    parser.add_argument("--commit", help="the commit of this tree, if it is a copy without git")
    options = parser.parse_args(argv)
    plan = one_device(options.commit) if options.ranks == 1 else several_ranks(options.ranks, options.device)
    try:
        stages = chosen(plan, options.names)
    except ValueError as error:
        parser.error(str(error))
    facts = {
        "command": provenance.command(),
        "commit": options.commit or provenance.commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    end_on_signals()
    passed = Run(stages, options.out, options.seconds, facts).run()
    print(f"{'all passed' if passed else 'not all passed'}: {options.out / 'report.md'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
