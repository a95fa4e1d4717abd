"""Record a run: the files of its folder, wandb and the lines in the terminal.

    recipe.yaml  provenance.json  diff.patch  metrics.jsonl  loss.png  sample.txt  trace.json  summary.json
    checkpoints/  wandb/

``summary.json`` comes last; its status is "finished", "stopped" (by a signal; resumable) or "failed".
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

from hybrid_sp.comm.ledger import Ledger
from hybrid_sp.comm.trace import Event, write_trace
from hybrid_sp.shard import KINDS
from recipes import config, lock, provenance
from recipes.config import Recipe, RecipeError
from recipes.data import nats_to_bits
from recipes.load import dump, load_resolved
from recipes.tracker import Tracker

PACKAGES = ("einops", "omegaconf", "wandb", "matplotlib", "numpy", "triton", "fla-core", "flash-attn")
FILES = (
    "loss.png",
    "sample.txt",
    "trace.json",
    "metrics.jsonl",
    "summary.json",
    "recipe.yaml",
    "provenance.json",
    "wandb",
)
Result = TypeVar("Result")
LINE_EVERY = 2.0  # seconds between progress lines
ANEW = "add name=ANOTHER_NAME for a new run, or checkpoint.resume=never to move the old one aside"


class TrainingStopped(RuntimeError):
    """Report that training cannot continue; every rank raises it, and the first process prints it."""


def check_same_run(folder: Path, recipe: Recipe, fingerprint: str) -> None:
    """Raise RecipeError if ``folder`` holds a run of another recipe or corpus, or files that cannot be read.

    This needs no process group.
    """
    if recipe.checkpoint.resume == "never" or not (folder / "provenance.json").exists():
        return
    before = _read_json(folder / "provenance.json", ("corpus",), ANEW)["corpus"]["fingerprint"]
    if changed := config.difference(read_recipe(folder), recipe):
        raise RecipeError(f"{folder} holds a run of another recipe: {', '.join(changed)}; {ANEW}")
    if before != fingerprint:
        raise RecipeError(
            f"{folder} holds a run on another corpus: its SHA-256 is {before[:12]}... there and {fingerprint[:12]}... "
            f"now (data.files, or another Python); {ANEW}"
        )


def finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the summary of a finished run that is not to run again, and print so in the first process; else None."""
    if recipe.checkpoint.resume == "never" or not (folder / "summary.json").exists():
        return None
    summary = read_summary(folder)
    if summary["status"] != "finished":
        return None
    if not (latest := folder / "checkpoints" / "latest").exists():
        raise RecipeError(f"{folder} is finished, but {latest} is missing, and its weights with it; {ANEW}")
    if is_main_process():
        say(f"{folder} is finished already; name=ANOTHER_NAME starts a new run\n{_closing(folder, summary)}")
    return summary


def is_main_process() -> bool:
    """Tell whether this process prints and writes for all: the only process, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


def read_summary(folder: Path) -> dict[str, Any]:
    """Read the summary of a run that has ended; raise RecipeError if it cannot be read."""
    advice = "delete it, and the same command goes on from the last checkpoint and writes it again"
    return _read_json(folder / "summary.json", ("status",), advice)


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of a run folder; raise RecipeError if it cannot be read."""
    path = folder / "recipe.yaml"
    try:
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        return load_resolved(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, ANEW) from error


def say(text: str, stream: Any = None) -> None:
    """Print to stdout or ``stream``; a reader that is gone, full or limited to ASCII does not end the run."""
    stream = sys.stdout if stream is None else stream
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), stream.fileno()
        )  # so that the rest of the stream's buffer fails no more


class Record:
    """Write and print the events of a run: `prepare`, `begin`, `train` and `validation` by turns, `finish` or `fail`.

    Only the first process writes and prints. Call `prepare`, `begin`, `flush` and `finish` only there, because they can
    fail.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe, self.active = folder, recipe, is_main_process()
        self._metrics = folder / "metrics.jsonl"
        self._unwritten: list[str] = []  # lines of metrics that did not fit on the disk
        self._tracker: Tracker | None = None

    def prepare(self, facts: dict[str, Any]) -> None:
        """Create or reopen the folder and write the recipe, command, commit, versions and ``facts`` of the run.

        Raise RecipeError if another process trains there or the folder cannot be written.
        """
        folder, recipe = self.folder, self.recipe
        with _writing(folder):
            take = lock.set_aside if recipe.checkpoint.resume == "never" else lock.hold
            self._lock = take(folder)  # until this process ends
            check_same_run(folder, recipe, facts["corpus"]["fingerprint"])  # again: another run may have come before
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").unlink(missing_ok=True)
            path = folder / "provenance.json"
            before = _read_json(path, ("started",), ANEW) if path.exists() else {}
            origin = {
                "command": provenance.command(),
                "commit": provenance.commit(),
                "untracked": provenance.untracked(),
                "versions": provenance.versions(PACKAGES),
                "machine": provenance.machine(),
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "earlier_starts": [*before.get("earlier_starts", []), *([before["started"]] if before else [])],
                "wandb_id": before.get("wandb_id") or os.urandom(4).hex(),
                **facts,
            }
            replace_file(folder / "diff.patch", provenance.diff())
            replace_file(folder / "recipe.yaml", dump(recipe))
            replace_file(path, json.dumps(origin, indent=1) + "\n")

    def begin(self, step: int) -> None:
        """Continue after ``step``; cut off the metrics of later steps, which a run wrote before it died."""
        lines = (line for line in read_metrics(self._metrics) if line["step"] <= step)
        with _writing(self.folder):
            replace_file(self._metrics, "".join(json.dumps(line) + "\n" for line in lines))
        if self.recipe.wandb.mode != "disabled":
            origin = _read_json(self.folder / "provenance.json", ("wandb_id",), ANEW)
            self._tracker = Tracker(self.folder, self.recipe, origin["wandb_id"])
        self._line_due = self._began = time.monotonic()
        self._first = step

    def say(self, text: str) -> None:
        """Print a text in the first process."""
        if self.active:
            say(text)

    def train(self, values: dict[str, Any]) -> None:
        """Record one optimiser step: a line of metrics, and a line of progress every two seconds."""
        if self.active:
            self._write({"kind": "train", **values, "memory_mb": round(_memory_mb(), 1)})
            if time.monotonic() >= self._line_due or values["step"] == self.recipe.train.steps:
                self._line_due = time.monotonic() + LINE_EVERY
                say(self._progress(values))

    def trace(self, events_of_ranks: list[list[Event]]) -> None:
        """Write the trace of one step, with the layers of every rank."""
        if self.active:
            _try("trace.json", lambda: write_trace(self.folder / "trace.json", events_of_ranks))

    def validation(self, values: dict[str, Any]) -> None:
        """Record one validation: a line of metrics and a line in the terminal."""
        if self.active:
            self._write({"kind": "validation", **values})
            say(f"step {values['step']:>6}  {_validated(values['bits_per_byte'], values['unigram_bits_per_byte'])}")

    def flush(self) -> None:
        """Write the metrics that are not on the disk yet; raise OSError, and leave no half of a line."""
        if not self._unwritten:
            return
        text = "".join(self._unwritten).encode()
        with self._metrics.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(text) < len(text):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._metrics))
        self._unwritten.clear()

    def finish(
        self, status: str, facts: dict[str, Any], write: Callable[[], str | None] | None = None
    ) -> dict[str, Any]:
        """End a saved run: draw the curve, keep the sample from ``write``, close wandb and write the summary last.

        Print where everything lies and return the summary. A failure of curve, sample or wandb is only a warning. Raise
        TrainingStopped if the summary cannot be written.
        """
        try:
            summary, sample = self._end(status, facts, write)
        except OSError as error:
            reason = f"the training has {status} and is saved, but summary.json is not written: {error}"
            say(f"error: {reason}; make room and start the same command again", sys.stderr)
            raise TrainingStopped(reason) from error
        say(_closing(self.folder, summary, sample))
        return summary

    def fail(self, facts: dict[str, Any], cause: str) -> None:
        """Print once, before anything else, why the run failed; then write as much as possible and raise nothing."""
        if self.active:
            say(f"error: {cause}", sys.stderr)
            _try("summary.json", lambda: self._end("failed", {**facts, "error": cause}, None))

    def _end(
        self, status: str, facts: dict[str, Any], write: Callable[[], str | None] | None
    ) -> tuple[dict[str, Any], str | None]:
        lines = read_metrics(self._metrics)
        summary = {"status": status, **facts, **_outcome(lines)}
        _try("loss.png", lambda: draw_loss(lines, self.folder / "loss.png", self.recipe.name))
        sample = _try("sample.txt", lambda: self._keep_sample(write)) if write is not None else None
        if (tracker := self._tracker) is not None:
            _try("wandb", lambda: tracker.finish(summary))
        replace_file(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary, sample

    def _keep_sample(self, write: Callable[[], str | None]) -> str | None:
        sample = write()
        if sample is not None:
            (self.folder / "sample.txt").write_text(sample, encoding="utf-8")
        return sample

    def _write(self, line: dict[str, Any]) -> None:
        self._unwritten.append(json.dumps(line) + "\n")
        try:
            self.flush()
        except OSError as error:
            if len(self._unwritten) == 1:
                say(
                    f"WARNING    {error}; metrics stay in memory until there is room, or the next checkpoint",
                    sys.stderr,
                )
        if self._tracker is not None:
            curves = {
                key if "/" in key else f"{line['kind']}/{key}": value
                for key, value in line.items()
                if key not in ("kind", "step")
            }
            try:
                self._tracker.log(curves, line["step"])
            except Exception as error:
                self._tracker = None
                say(
                    f"WARNING    wandb has ended: {type(error).__name__}: {error}; training goes on without", sys.stderr
                )

    def _progress(self, values: dict[str, Any]) -> str:
        step, steps = values["step"], self.recipe.train.steps
        left = (time.monotonic() - self._began) / (step - self._first) * (steps - step)
        return (
            f"step {step:>6}/{steps}  loss {values['loss']:.4f}  grad norm {values['grad_norm']:.3f}  "
            f"lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tokens/s  {_clock(left)} left"
        )


def communication(book: Ledger) -> dict[str, float]:
    """Sum up the communication of one rank's step for its line of metrics, in total and by kind of layer.

    The values are calls, bytes received and milliseconds of exposed waiting.
    """

    def exposed(*tags: str) -> float:
        return round(1e3 * sum(wait.end - wait.begin for wait in book.waits if not tags or wait.tag in tags), 3)

    received = {f"comm/bytes_{tag}": sum(row.bytes for row in book.select(tag=tag)) for tag in (*KINDS, "gradients")}
    waited = {f"comm/exposed_{kind}_ms": exposed(kind) for kind in KINDS}
    return {"comm/exposed_ms": exposed(), **waited, "comm/calls": book.calls, "comm/bytes": book.bytes, **received}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a ``metrics.jsonl``; drop a last line that a dying process wrote only in part."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _outcome(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the metrics: the mean training loss of the last 20 steps and the last validation."""
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    validations = [line for line in lines if line["kind"] == "validation"]
    outcome: dict[str, Any] = {}
    if losses:
        outcome |= {"tokens": lines[-1]["tokens"], "train_loss": sum(losses[-20:]) / len(losses[-20:])}
    if validations:
        bits, unigram = validations[-1]["bits_per_byte"], validations[-1]["unigram_bits_per_byte"]
        outcome |= {
            "validation_loss": validations[-1]["loss"],
            "bits_per_byte": bits,
            "unigram_bits_per_byte": unigram,
            "below_unigram": below_unigram(bits, unigram),
        }
    return outcome


def below_unigram(bits: float, unigram: float) -> float | None:
    """Return the share of the byte-unigram entropy that a model saves; None for entropy 0, when all bytes are equal."""
    return 1 - bits / unigram if unigram else None


def _validated(bits: float, unigram: float) -> str:
    below = below_unigram(bits, unigram)
    of = "of bytes that are all equal" if below is None else f"{below:.1%} below the byte-unigram entropy {unigram:.3f}"
    return f"validation {bits:.3f} bits/byte, {of}"


def _closing(folder: Path, summary: dict[str, Any], sample: str | None = None) -> str:
    """Return the last words of a run: its result, a sample of the model and a list of its files."""
    text = (
        f"{summary['status']:<10} {summary['steps']} steps, {summary.get('tokens', 0):,} tokens "
        f"in {_clock(summary['seconds'])}"
    )
    if "bits_per_byte" in summary:
        text += f"; {_validated(summary['bits_per_byte'], summary['unigram_bits_per_byte'])}"
    if summary["status"] == "stopped":
        return f"{text}\nto go on    the same command again"
    if sample is not None:
        text += f"\n\n{sample}\n"
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    files = [str(path) for name in (*FILES, f"checkpoints/{latest}") if (path := folder / name).exists()]
    return f"{text}\nfiles      " + "\n           ".join(files) + f"\nmore text  python -m recipes.generate {folder}"


def draw_loss(lines: list[dict[str, Any]], picture: Path, title: str) -> None:
    """Draw training and validation loss in bits per byte over bytes read, with the byte-unigram entropy."""
    if not lines:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles: dict[str, dict[str, Any]] = {
        "train": {"label": "training", "color": "0.7", "linewidth": 1},
        "validation": {"label": "validation", "color": "black", "marker": "o", "markersize": 4},
    }
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, style in styles.items():
        chosen = [line for line in lines if line["kind"] == kind]
        axes.plot([line["tokens"] / 1e6 for line in chosen], [nats_to_bits(line["loss"]) for line in chosen], **style)
    for unigram in {line["unigram_bits_per_byte"] for line in lines if line["kind"] == "validation"}:
        axes.axhline(unigram, color="black", linestyle=":", label=f"byte-unigram entropy ({unigram:.2f})")
    axes.set(xlabel="bytes read, millions", ylabel="loss, bits per byte", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the system's error about a folder that cannot be written into a RecipeError."""
    try:
        yield
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written: {error}; mend that, or set out=ANOTHER_FOLDER") from error


def _try(product: str, action: Callable[[], Result]) -> Result | None:
    """Return the result of ``action``; if it fails, warn and return None, because no by-product ends a training."""
    try:
        return action()
    except Exception as error:
        say(f"WARNING    {product} is not as it should be: {type(error).__name__}: {error}", sys.stderr)
        return None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def _memory_mb() -> float:
    """Return the peak memory of this process: on the GPU if it uses one, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # in bytes on macOS, in KiB elsewhere


def _read_json(path: Path, keys: Sequence[str], advice: str) -> dict[str, Any]:
    """Read the object in a file of a run folder; raise RecipeError with ``advice`` if it is broken or lacks a key."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return content
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error, advice) from error


def _unreadable(path: Path, error: Exception, advice: str) -> RecipeError:
    return RecipeError(f"{path} cannot be read: {config.first_line(error)}; {advice}")


def replace_file(path: Path, text: str) -> None:
    """Write a file so that it is complete or absent, even after a crash of the machine."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
