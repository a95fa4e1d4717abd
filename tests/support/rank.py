"""The side of the ranks: one process that has imported torch and hybrid_sp, and the ranks that are forked from it."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from types import ModuleType
from typing import Any


def fork_ranks(pipe: Connection) -> None:
    """Answer the tests: fork a rank and say its number, or wait for one to end and say its exit code."""
    sys.path[:] = pipe.recv()
    import torch._dynamo  # noqa: F401 (an optimiser imports it)

    import hybrid_sp  # noqa: F401 (and torch, so that no rank has to; none of them starts a thread)

    while True:
        try:
            task, *rest = pipe.recv()
        except EOFError:
            return
        if task == "wait":
            pipe.send(os.waitstatus_to_exitcode(os.waitpid(rest[0], 0)[1]))
            continue
        environment, stack_path = rest
        handle = recv_handle(pipe)
        if (child := os.fork()) == 0:
            pipe.close()
            os.setsid()
            os.environ.clear()
            os.environ.update(environment)
            serve(Connection(handle), stack_path)
            os._exit(0)
        os.close(handle)
        pipe.send(child)


def serve(pipe: Connection, stack_path: str) -> None:
    """A rank's life: settings, then one call after another until the tests are over."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    sys.path[:] = pipe.recv()
    import torch
    import torch.distributed

    from tests.support.arithmetic import Arithmetic
    from tests.support.ranks import START_SECONDS, packed, unpacked

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
    fork_ranks(Connection(int(sys.argv[1])))
