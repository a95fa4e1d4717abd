"""run_ranks: one function on P ranks (gloo, a file store, no ports), with errors that name the rank.

Rank processes (`rank.py` beside) stay warm from one call to the next; only the process group is new. Whatever happens
in a failed call, its processes are killed and the next call gets fresh ones. Importing torch and hybrid_sp costs
seconds: one process does it, and ranks are forked from it.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

START_SECONDS = 600.0  # for processes to import torch and the test, and to meet, on a loaded machine
GRACE_SECONDS = 2.0  # after the first failure, for the others to say what they saw

arithmetic: dict[str, Any] = {}  # how ranks compute: what conftest.py gives Arithmetic in this process


class RankError(AssertionError):
    """A rank failed, died or did not finish; the message names it and says where the others were."""


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, deadline: float = 60.0, **kwargs: Any) -> list[Any]:
    """fn(group, *args, **kwargs) on `world` ranks; returns what each rank returned, in rank order.

    fn is a function at the top of a module; group is the default group of that world. Arguments and results travel
    through torch.save. Every rank's stack is reported when `deadline` seconds have passed since the last rank came to
    fn. Raises RankError.
    """
    if world < 1:
        raise ValueError(f"world must be at least 1, got {world}")
    if "<" in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} is not at the top of its module: the ranks could not import it")
    try:
        _pool.grow(world)
        return _pool.call(fn, world, args, kwargs, deadline)
    except BaseException:
        _pool.close()
        raise


def close_pool() -> None:
    """Ends the rank processes; the next run_ranks starts new ones."""
    _pool.end()


class Forker:
    """The process that ranks are forked from. It is their parent, so it is asked how they ended."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rank.py")), str(theirs.fileno())],
                stdin=subprocess.PIPE,  # never written: its end of file tells all of them that we are gone
                pass_fds=[theirs.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self.pipe = Connection(ours.detach())
        self.pipe.send(sys.path)

    def fork(self, socket_: socket.socket, stack_path: str) -> Process:
        """A rank that talks through this socket."""
        self.pipe.send(("fork", dict(os.environ), stack_path))
        send_handle(self.pipe, socket_.fileno(), self.process.pid)
        return Process(self, self.answer(START_SECONDS))

    def answer(self, timeout: float) -> int:
        if not self.pipe.poll(timeout):
            raise RankError(f"the process that ranks are forked from has not answered within {timeout:.0f} s")
        return self.pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Process:
    """A rank's process, as of subprocess, but that it is not our child."""

    def __init__(self, forker: Forker, pid: int) -> None:
        self.forker, self.pid = forker, pid
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:  # nobody has waited for it: the number is still its own
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """Its exit code, negative for a signal that ended it."""
        if self.returncode is None:
            self.forker.pipe.send(("wait", self.pid))
            self.returncode = self.forker.answer(timeout)
        return self.returncode


class Worker:
    """One rank's process, the pipe to it, and the file its stack is dumped into."""

    def __init__(self, rank: int, forker: Forker) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        self.stack_file = tempfile.NamedTemporaryFile(prefix=f"rank-{rank}-stack-")  # noqa: SIM115 (as long as the rank)
        with theirs:
            self.process = forker.fork(theirs, self.stack_file.name)
        self.pipe = Connection(ours.detach())
        self.pipe.send(sys.path)
        self.pipe.send(arithmetic)

    def stack(self) -> str:
        """Where the rank was when `end_with_stacks` ended it: its call stack, innermost frame last."""
        blocks = Path(self.stack_file.name).read_text().split("\n\n")
        serving = [block.splitlines() for block in blocks if block.count(" in serve\n")]
        if not serving:
            return "    (no Python stack to be had)"
        frames = [line for line in serving[0] if line.lstrip().startswith("File")]
        outermost = next(i for i, line in enumerate(frames) if line.endswith(" in serve"))
        return "\n".join("  " + line for line in reversed(frames[:outermost]))

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(START_SECONDS)
        self.pipe.close()
        self.stack_file.close()


class Pool:
    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.forker: Forker | None = None

    def grow(self, world: int) -> None:
        self.forker = self.forker or Forker()
        new = [Worker(rank, self.forker) for rank in range(len(self.workers), world)]
        self.workers += new
        for worker in new:
            if not worker.pipe.poll(START_SECONDS):
                raise RankError(f"rank {worker.rank} did not start within {START_SECONDS:.0f} s")
            try:
                worker.pipe.recv()
            except (EOFError, OSError) as error:
                raise RankError(f"rank {worker.rank} died at its start: {exit_words(worker)}") from error

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers = []

    def end(self) -> None:
        self.close()
        if self.forker is not None:
            self.forker.end()
            self.forker = None

    def call(self, fn: Callable[..., Any], world: int, args: Any, kwargs: Any, deadline: float) -> list[Any]:
        workers = self.workers[:world]
        source = (fn.__module__, sys.modules[fn.__module__].__file__, fn.__qualname__)
        results: dict[int, Any] = {}
        failures: dict[int, tuple[float, str, str]] = {}  # rank -> time, one line, everything
        running = {worker.pipe: worker for worker in workers}
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            for worker in workers:
                worker.pipe.send((f"file://{folder}/store", world, worker.rank, deadline, source))
                worker.pipe.send_bytes(packed((args, kwargs)))
            ends, entered = time.monotonic() + START_SECONDS, 0
            while running and (left := ends - time.monotonic()) > 0:
                for pipe in wait(list(running), timeout=left):
                    assert isinstance(pipe, Connection)
                    worker = running[pipe]
                    try:
                        kind, when, *rest = pipe.recv()
                    except (EOFError, OSError):
                        kind, (when, *rest) = "failed", death(worker)
                    if kind == "entered":
                        entered += 1
                        if entered == world and not failures:
                            ends = time.monotonic() + deadline
                    elif kind == "returned":
                        results[worker.rank] = unpacked(rest[0])  # its last word, after the barrier, frees the process
                    else:
                        del running[pipe]
                    if kind == "failed":
                        failures[worker.rank] = (when, rest[0], rest[1])
                        ends = min(ends, time.monotonic() + GRACE_SECONDS)
            if running or failures:
                late = [worker for worker in running.values() if worker.rank not in results]
                for worker in end_with_stacks(late):
                    failures[worker.rank] = death(worker)
                    late.remove(worker)
                trouble = f"not finished after {deadline:g} s" if entered == world else f"only {entered} began"
                raise RankError(report(fn.__qualname__, world, trouble, failures, results, late))
        return [results[rank] for rank in range(world)]


def report(
    name: str,
    world: int,
    trouble: str,
    failures: dict[int, tuple[float, str, str]],
    results: dict[int, Any],
    late: list[Worker],
) -> str:
    """The earliest failure in full, one line for each other rank, and the stack of those that had not finished."""
    lines = [f"{name} on {world} ranks: {trouble}"]
    first = min(failures, key=lambda rank: failures[rank][0]) if failures else None
    if first is not None:
        lines = [f"rank {first} of {world} failed first in {name}: {failures[first][1]}", failures[first][2]]
    later = {rank: failures[rank][1] for rank in sorted(failures) if rank != first}
    for line in dict.fromkeys(later.values()):
        lines.append(f"rank {', '.join(str(r) for r in later if later[r] == line)} failed later: {line}")
    lines += [f"rank {rank} finished" for rank in sorted(results) if rank not in failures]
    for worker in late:
        lines += [f"rank {worker.rank} was still at (innermost last):", worker.stack()]
    return "\n".join(lines)


def exit_words(worker: Worker) -> str:
    code = worker.process.wait(START_SECONDS)
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def death(worker: Worker) -> tuple[float, str, str]:
    """The failure of a rank that ended without a word. It is the earliest: the others fail because it is gone."""
    return 0.0, exit_words(worker), f"the process of rank {worker.rank} {exit_words(worker)}"


def end_with_stacks(workers: list[Worker]) -> list[Worker]:
    """Each writes its stack and ends, so that the stack is whole. Returns those that had ended by themselves.

    All of them stand still before the first one ends, for the end of one would move those that wait for it.
    """
    for number in (signal.SIGSTOP, signal.SIGUSR1, signal.SIGCONT):
        for worker in workers:
            worker.process.send_signal(number)
    return [worker for worker in workers if worker.process.wait(START_SECONDS) != -signal.SIGUSR1]


def packed(value: Any) -> bytes:
    """Plain bytes: tensors in shared memory would use up file descriptors."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


_pool = Pool()
atexit.register(_pool.end)
