"""run_ranks: one function on P ranks (gloo, a file store, no ports), with errors that name the rank.

Starting a process and importing torch costs seconds, so rank processes stay warm from one call to the next; only the
process group is new. Whatever happens in a failed call, its processes are killed and the next call gets fresh ones.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib.util
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
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
    _pool.close()


# -- the side of the tests -------------------------------------------------------------------------------------------


class Worker:
    """One rank's process, the pipe to it, and the file its stack is dumped into."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        self.stack_file = tempfile.NamedTemporaryFile(prefix=f"rank-{rank}-stack-")  # noqa: SIM115 (as long as the rank)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), self.stack_file.name],
                stdin=subprocess.PIPE,  # never written: its end of file tells the rank that we are gone
                pass_fds=[theirs.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
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
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.pipe.close()
        self.stack_file.close()


class Pool:
    def __init__(self) -> None:
        self.workers: list[Worker] = []

    def grow(self, world: int) -> None:
        new = [Worker(rank) for rank in range(len(self.workers), world)]
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
atexit.register(_pool.close)


# -- the side of the ranks -------------------------------------------------------------------------------------------


def serve(pipe: Connection, stack_path: str) -> None:
    """A rank's life: settings, then one call after another until the tests are over."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    sys.path[:] = pipe.recv()
    import torch
    import torch.distributed

    from tests.support.arithmetic import Arithmetic

    given = Arithmetic(**pipe.recv())
    environment = dict(os.environ)
    pipe.send("ready")
    with open(stack_path, "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True, chain=True)  # then it ends us
        while True:
            try:
                store, world, rank, deadline, source = pipe.recv()
            except EOFError:
                return
            data = pipe.recv_bytes()
            try:
                os.environ.clear()
                os.environ.update(environment)
                given.apply()
                torch.set_default_dtype(torch.float32)
                torch.use_deterministic_algorithms(True)
                torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
                torch.manual_seed(0)
                fn = load_function(*source)
                args, kwargs = unpacked(data)
                torch.distributed.init_process_group("gloo", store, timedelta(seconds=START_SECONDS), world, rank)
                # Shorter than the deadline, so that a rank waiting for another says so itself.
                torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=0.6 * deadline))
                pipe.send(("entered", time.monotonic()))
                result = fn(torch.distributed.group.WORLD, *args, **kwargs)
                pipe.send(("returned", time.monotonic(), packed(result)))
                torch.distributed.barrier()  # a group that is destroyed while a peer still works fails the peer
                torch.distributed.destroy_process_group()
                pipe.send(("left", time.monotonic()))
            except BaseException as error:
                line = traceback.format_exception_only(error)[-1].strip()
                pipe.send(("failed", time.monotonic(), line, traceback.format_exc()))


def load_function(module_name: str, path: str, qualname: str) -> Callable[..., Any]:
    """From its file, under the name pytest gave the module: pickled classes of that module then resolve too."""
    if module_name == "__main__":
        module_name = f"ranks_main_{Path(path).stem}"
    module = sys.modules.get(module_name)
    if module is None or module.__file__ != path:
        module = load_module(module_name, path)
    fn: Any = module
    for part in qualname.split("."):
        fn = getattr(fn, part)
    return fn


def load_module(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path} cannot be imported"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def leave_with_parent() -> None:
    """Standard input ends when the parent does, however it ended; a rank never outlives it."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2])
