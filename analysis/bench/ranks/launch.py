"""The launcher of rank processes: it runs a command on every rank of a network, or asks the ranks a question."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import hybrid_sp as hsp
from analysis.bench.ranks.network import Network
from hybrid_sp.comm import collectives, groups
from hybrid_sp.comm.groups import Group

ROOT = Path(__file__).parents[3]
TIMEOUT = timedelta(minutes=5)  # for a collective
QUESTION, ANSWER = "question.json", "answer.json"


def launch(command: Sequence[str], network: Network, threads: int = 1, tree: Path = ROOT) -> None:
    """Run the command on every rank of the network, with the variables of torchrun, from the root of a checkout.

    The first failure ends all ranks and raises RuntimeError with the last output of each rank.
    """
    shared = {"WORLD_SIZE": str(len(network.ranks)), "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": str(threads)}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, (prefix, environment) in enumerate(network.ranks):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            variables = os.environ | environment | shared | {"RANK": str(rank)}
            process = subprocess.Popen([*prefix, *command], env=variables, cwd=tree, stdout=output, stderr=output)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append((process, output))
        codes: list[int | None] = [None]
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [process.poll() for process, _ in processes]
        if any(codes):
            said = [f"{' '.join(command)} failed"]
            for rank, (_, output) in enumerate(processes):
                output.seek(0)
                said.append(f"rank {rank}, exit code {codes[rank]}:\n{output.read()[-4000:]}")
            raise RuntimeError("\n".join(said))


def free_port() -> int:
    """Return a port that no one listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(module: str, question: Any, network: Network) -> Any:
    """Run a module on every rank and return the answer of rank 0; the module calls `answer` as a program.

    Question and answer must be values that JSON can hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, QUESTION).write_text(json.dumps(question))
        launch([sys.executable, "-m", module, folder], network)
        return json.loads(Path(folder, ANSWER).read_text())


def answer(find: Callable[[Any, Group], Any]) -> None:
    """Answer the question of `ask` on this rank, with one thread, by `find(question, group)`."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    group = hsp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout=TIMEOUT)["sp"].get_group()
    found = find(json.loads((folder / QUESTION).read_text()), group)
    if groups.rank(group) == 0:
        (folder / ANSWER).write_text(json.dumps(found))
    collectives.leave(group)
