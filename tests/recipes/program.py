"""The training program on ranks of its own, forked from one warm process, with faults injected into the ranks.

Importing torch takes seconds and forking it milliseconds. A rank is a real process: it may be killed, has an exit code,
and runs `recipes.train.main` as under torchrun. Faults patch functions in the forked rank, so the product has no switch
for them.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REFUSED = 2  # exit code of a recipe that cannot be run: the other ranks then wait to be ended, as torchrun does it
GRACE = 60.0  # seconds for the others to end when one has failed otherwise: each finds out by itself


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Exit codes (negative: killed by that signal) and what each rank printed."""

    codes: list[int]
    texts: list[str]

    @property
    def ok(self) -> bool:
        return not any(self.codes)

    def __str__(self) -> str:
        pairs = zip(self.codes, self.texts, strict=True)
        return "\n".join(f"--- rank {rank}: exit code {code}\n{text}" for rank, (code, text) in enumerate(pairs))


def run_program(
    *arguments: str,
    ranks: int = 1,
    fault: str | None = None,
    rank: int = 0,
    nth: int = 1,
    draws: bool = False,
    deadline: float = 300.0,
) -> Outcome:
    """``recipes.train.main(arguments)`` on some ranks; a ``fault`` of FAULTS strikes one of them, its nth time.

    Drawing the loss takes longer than training, so a run does it only if `draws` is true.
    """
    with tempfile.TemporaryDirectory() as logs:
        request = {"arguments": arguments, "ranks": ranks, "fault": fault, "rank": rank, "nth": nth, "draws": draws}
        for one in range(ranks):  # a rank may be ended before it comes to open its own
            Path(logs, str(one)).touch()
        codes = _server().ask({**request, "deadline": deadline, "logs": logs})
        return Outcome(codes=codes, texts=[Path(logs, str(r)).read_text(errors="replace") for r in range(ranks)])


# ---------------------------------------------------------------------------------------------------------- the client


class _Server:
    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.recipes.program"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        atexit.register(self.process.terminate)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the process that forks ranks has died"
        return json.loads(answer)


_servers: list[_Server] = []


def _server() -> _Server:
    if not _servers:
        _servers.append(_Server())
    return _servers[0]


# ---------------------------------------------------------------------------------------------------------- the server


def serve() -> None:
    """Answers one request a line until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(_fork_ranks(json.loads(line))), file=answers, flush=True)


def _fork_ranks(request: dict[str, Any]) -> list[int]:
    port, children = _free_port(), {}
    for rank in range(request["ranks"]):
        if (child := os.fork()) == 0:
            _be_rank(request, rank, port)
        children[child] = rank
    codes: dict[int, int] = {}
    deadline = time.monotonic() + request["deadline"]
    while len(codes) < len(children):
        for child in children.keys() - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + GRACE * (codes[child] != REFUSED))
        if time.monotonic() > deadline:
            for child in children.keys() - codes.keys():
                os.kill(child, signal.SIGTERM if time.monotonic() < deadline + GRACE else signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _be_rank(request: dict[str, Any], rank: int, port: int) -> None:
    """Runs the program and never returns."""
    from recipes import record, train

    log = os.open(Path(request["logs"], str(rank)), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        if request["ranks"] > 1:
            world = str(request["ranks"])
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        train.PATIENCE = request["deadline"]
        _draw_numbers(rank)
        if not request["draws"]:
            record.draw_loss = lambda *_: None
        if request["fault"] is not None:
            FAULTS[request["fault"]](request["nth"] if rank == request["rank"] else 0)
        code = train.main(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------------------------------------------------- the faults


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _draw_numbers(rank: int) -> None:
    """Every step draws random numbers, on each rank another number of them: resuming must restore each rank's state."""
    import torch

    from recipes.train import Run

    _before(Run, "train_step", None, lambda: torch.rand(1 + rank))


def _before(
    owner: Any, name: str, nth: int | None, act: Callable[[], Any], only: Callable[..., bool] | None = None
) -> None:
    """Calls ``act`` before the nth call of ``owner.name`` (of those that ``only`` selects); 0 is never, None always."""
    original, calls = getattr(owner, name), 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        chosen = only is None or only(*args, **kwargs)
        calls += chosen
        if chosen and nth in (None, calls):
            act()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def _kill_before_first_byte(nth: int) -> None:
    from recipes import checkpoint

    _before(checkpoint.dcp, "save", nth, _die)


def _kill_inside_shard(nth: int) -> None:
    """Dies when a file of the nth save has some, but not all, of its tensors."""
    from torch.distributed.checkpoint import filesystem

    from recipes import checkpoint

    original, saves, items = filesystem._write_item, 0, 0
    save = checkpoint.dcp.save

    def count_saves(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        saves += 1
        return save(*args, **kwargs)

    def write_item(transforms: Any, stream: Any, *args: Any) -> Any:
        nonlocal items
        items += saves == nth
        if items == 4:
            stream.write(b"half a tensor")
            stream.flush()
            _die()
        return original(transforms, stream, *args)

    checkpoint.dcp.save = count_saves
    filesystem._write_item = write_item


def _kill_before_manifest(nth: int) -> None:
    from recipes import checkpoint

    _before(checkpoint, "_write_manifest", nth, _die)


def _kill_before_rename(nth: int) -> None:
    _before(os, "rename", nth, _die, only=lambda old, new: Path(old).name.startswith(".saving"))


def _kill_before_latest(nth: int) -> None:
    from recipes import checkpoint

    _before(checkpoint, "_point", nth, _die)


def _kill_in_step(nth: int) -> None:
    import hybrid_sp

    _before(hybrid_sp, "sum_gradients", nth, _die)


def _terminate_in_step(nth: int) -> None:
    import hybrid_sp

    _before(hybrid_sp, "sum_gradients", nth, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _loss_is_nan(nth: int) -> None:
    from layers.model import HybridLM

    original, calls = HybridLM.loss, 0

    def loss(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        value, count = original(self, *args)
        return value * float("nan") if calls == nth else value, count

    HybridLM.loss = loss


def _gradient_is_infinite(nth: int) -> None:
    import hybrid_sp

    original, calls = hybrid_sp.sum_gradients, 0

    def sum_gradients(parameters: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        parameters = list(parameters)
        if calls == nth:
            parameters[0].grad[0] = float("inf")
        return original(parameters, *args)

    hybrid_sp.sum_gradients = sum_gradients


def _parameter_drifts(nth: int) -> None:
    from recipes.optim import Optimizer

    original, calls = Optimizer.step, 0

    def step(self: Any, lr: float) -> None:
        nonlocal calls
        calls += 1
        original(self, lr)
        if calls == nth:
            self.masters["blocks.1.mlp.output.weight"].data[0, 0] += 1e-6

    Optimizer.step = step


def _no_room(*args: Any) -> None:
    raise OSError(28, "No space left on device")


def _disk_is_full(nth: int) -> None:
    from torch.distributed.checkpoint import filesystem

    if nth:
        filesystem._write_item = _no_room


def _metrics_have_no_room_once(nth: int) -> None:
    _before(
        Path, "open", nth, _no_room, only=lambda path, mode="r", *_, **__: path.name == "metrics.jsonl" and "a" in mode
    )


def _metrics_have_no_room(nth: int) -> None:
    """From the nth line on."""
    if nth:
        seen: list[Path] = []

        def late(path: Path, mode: str = "r", *_: Any, **__: Any) -> bool:
            seen.extend([path] * (path.name == "metrics.jsonl" and "a" in mode))
            return path.name == "metrics.jsonl" and "a" in mode and len(seen) >= nth

        _before(Path, "open", None, _no_room, only=late)


def _summary_has_no_room(nth: int) -> None:
    _before(os, "replace", nth, _no_room, only=lambda old, new: Path(new).name == "summary.json")


def _nobody_reads(nth: int) -> None:
    """Stdout is a pipe whose reader has gone, as behind ``| head``."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def _terminal_is_ascii(nth: int) -> None:
    sys.stdout.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]


def _wandb_has_no_key(nth: int) -> None:
    os.environ.pop("WANDB_API_KEY", None)
    os.environ.update(HOME="/nowhere", NETRC="/nowhere")


def _wandb_is_not_installed(nth: int) -> None:
    sys.modules["wandb"] = None  # type: ignore[assignment]


FAULTS: dict[str, Callable[[int], None]] = {
    "killed before the first byte": _kill_before_first_byte,
    "killed inside a shard file": _kill_inside_shard,
    "killed before the manifest": _kill_before_manifest,
    "killed before the rename": _kill_before_rename,
    "killed before latest": _kill_before_latest,
    "killed in a step": _kill_in_step,
    "terminated in a step": _terminate_in_step,
    "loss is nan": _loss_is_nan,
    "gradient is infinite": _gradient_is_infinite,
    "parameter drifts": _parameter_drifts,
    "disk is full": _disk_is_full,
    "metrics have no room once": _metrics_have_no_room_once,
    "metrics have no room": _metrics_have_no_room,
    "summary has no room": _summary_has_no_room,
    "nobody reads": _nobody_reads,
    "terminal is ASCII": _terminal_is_ascii,
    "wandb has no key": _wandb_has_no_key,
    "wandb is not installed": _wandb_is_not_installed,
}


if __name__ == "__main__":
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo  # an optimiser imports it
    import wandb  # noqa: F401

    import recipes.train  # noqa: F401

    torch.set_num_threads(1)
    serve()
