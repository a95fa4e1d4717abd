"""The run folder and everything that a run tells the outside: files, wandb and the lines in the terminal.

    recipe.yaml  provenance.json  diff.patch  metrics.jsonl  loss.png  sample.txt  trace.json  summary.json
    checkpoints/  wandb/

``summary.json`` is written last; its status is "finished", "stopped" (by a signal; resumable) or "failed".
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hybrid_sp.mesh import KINDS
from hybrid_sp.timeline import Ledger
from hybrid_sp.trace import Event, write_trace
from recipes import config
from recipes.config import Recipe, RecipeError
from recipes.data import nats_to_bits

PACKAGES = ("torch", "einops", "omegaconf", "wandb", "matplotlib", "numpy", "triton", "fla-core", "flash-attn")
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
LINE_EVERY = 2.0  # seconds between progress lines


def refuse_other_run(folder: Path, recipe: Recipe, fingerprint: str) -> None:
    """Raises RecipeError if ``folder`` holds a run of another recipe or corpus; needs no process group."""
    if recipe.checkpoint.resume == "never" or not (folder / "provenance.json").exists():
        return
    advice = "add name=ANOTHER_NAME for a new run, or checkpoint.resume=never to move the old one aside"
    if changed := config.difference(config.load_resolved(folder / "recipe.yaml"), recipe):
        raise RecipeError(f"{folder} holds a run of another recipe: {', '.join(changed)}; {advice}")
    before = json.loads((folder / "provenance.json").read_text())["corpus"]["fingerprint"]
    if before != fingerprint:
        raise RecipeError(
            f"{folder} holds a run on another corpus: its SHA-256 is {before[:12]}... there and {fingerprint[:12]}... "
            f"now (data.files, or another Python); {advice}"
        )


def finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of the run in ``folder`` if it is finished and not to be made anew; the first process says so."""
    if recipe.checkpoint.resume == "never" or not (folder / "summary.json").exists():
        return None
    summary = read_summary(folder)
    if summary["status"] != "finished":
        return None
    if first_process():
        print(
            f"{folder} is finished already; name=ANOTHER_NAME starts a new run\n{_closing(folder, summary)}", flush=True
        )
    return summary


def first_process() -> bool:
    """Whether this process speaks and writes for all: it alone, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


def read_summary(folder: Path) -> dict[str, Any]:
    """What a run says about itself when it ends."""
    return json.loads((folder / "summary.json").read_text())


class Record:
    """What a run tells, in this order: `prepare`, `begin`, `train` and `validation` by turns, `finish`.

    Only the first process writes and speaks; `prepare` and `begin`, which can fail, are called in it alone.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe, self.active = folder, recipe, first_process()
        self._metrics = folder / "metrics.jsonl"

    def prepare(self, facts: dict[str, Any]) -> None:
        """Makes or reopens the folder and writes what runs in it: recipe, command, commit, versions and ``facts``.

        Raises RecipeError if another process is training there.
        """
        folder, recipe = self.folder, self.recipe
        if recipe.checkpoint.resume == "never" and (folder / "provenance.json").exists():
            number = 1
            while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
                number += 1
            os.rename(folder, aside)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("w")  # held as long as this process lives
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RecipeError(
                f"another process is training in {folder}; wait for it, or add name=ANOTHER_NAME"
            ) from error
        (folder / "summary.json").unlink(missing_ok=True)
        path = folder / "provenance.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        commit, diff = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
        provenance = {
            "command": _command(),
            "commit": commit.strip() if commit else None,
            "untracked": (_git("ls-files", "--others", "--exclude-standard") or "").splitlines(),
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "earlier_starts": [*before.get("earlier_starts", []), *([before["started"]] if before else [])],
            "wandb_id": before.get("wandb_id") or os.urandom(4).hex(),
            **facts,
        }
        _replace(folder / "diff.patch", diff or "")
        _replace(folder / "recipe.yaml", config.dump(recipe))
        _replace(path, json.dumps(provenance, indent=1) + "\n")

    def begin(self, step: int) -> None:
        """Goes on after ``step``: metrics of later steps, which a run wrote before it died, are cut off."""
        lines = (line for line in read_metrics(self._metrics) if line["step"] <= step)
        _replace(self._metrics, "".join(json.dumps(line) + "\n" for line in lines))
        self._wandb = _start_wandb(self.folder, self.recipe)
        self._line_due = self._began = time.monotonic()
        self._first = step

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def train(self, values: dict[str, Any]) -> None:
        """One optimiser step: a line of metrics, and now and then of progress."""
        if self.active:
            self._write({"kind": "train", **values, "memory_mb": round(_memory_mb(), 1)})
            if time.monotonic() >= self._line_due or values["step"] == self.recipe.train.steps:
                self._line_due = time.monotonic() + LINE_EVERY
                print(self._progress(values), flush=True)

    def trace(self, events_of_ranks: list[list[Event]]) -> None:
        """What every rank's layers did in one step."""
        if self.active:
            write_trace(self.folder / "trace.json", events_of_ranks)

    def validation(self, values: dict[str, Any]) -> None:
        if self.active:
            self._write({"kind": "validation", **values})
            bits, unigram = values["bits_per_byte"], values["unigram_bits_per_byte"]
            print(
                f"step {values['step']:>6}  validation {bits:.3f} bits/byte, {1 - bits / unigram:.1%} below the "
                f"byte-unigram entropy {unigram:.3f}",
                flush=True,
            )

    def finish(self, status: str, facts: dict[str, Any], sample: str | None = None) -> None:
        """Draws the curve, closes wandb, writes ``summary.json``, last, and says where all is."""
        if self.active:
            lines = read_metrics(self._metrics)
            summary = {"status": status, **facts, **_outcome(lines)}
            draw_loss(lines, self.folder / "loss.png", self.recipe.name)
            if sample is not None:
                (self.folder / "sample.txt").write_text(sample)
            self._wandb.summary.update(summary)
            self._wandb.finish(exit_code=int(status == "failed"))
            _replace(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
            stream = sys.stderr if status == "failed" else sys.stdout
            print(_closing(self.folder, summary, sample), file=stream, flush=True)

    def _write(self, line: dict[str, Any]) -> None:
        with self._metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        kind, step = line["kind"], line["step"]
        named = {key if "/" in key else f"{kind}/{key}": line[key] for key in line if key not in ("kind", "step")}
        self._wandb.log({**named, "step": step})

    def _progress(self, values: dict[str, Any]) -> str:
        step, steps = values["step"], self.recipe.train.steps
        left = (time.monotonic() - self._began) / (step - self._first) * (steps - step)
        return (
            f"step {step:>6}/{steps}  loss {values['loss']:.4f}  grad norm {values['grad_norm']:.3f}  "
            f"lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tokens/s  {_clock(left)} left"
        )


def communication(book: Ledger) -> dict[str, float]:
    """What one rank's step has communicated, for its line of metrics: calls, bytes received, and milliseconds in which
    it stood still; of all, and by kind."""

    def exposed(*tags: str) -> float:
        return round(1e3 * sum(wait.end - wait.begin for wait in book.waits if not tags or wait.tag in tags), 3)

    received = {f"comm/bytes_{tag}": sum(row.bytes for row in book.select(tag=tag)) for tag in (*KINDS, "gradients")}
    stood = {f"comm/exposed_{kind}_ms": exposed(kind) for kind in KINDS}
    return {"comm/exposed_ms": exposed(), **stood, "comm/calls": book.calls, "comm/bytes": book.bytes, **received}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a dying process left half written is dropped."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _outcome(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the metrics come to: the mean training loss of the last 20 steps and the last validation."""
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    validations = [line for line in lines if line["kind"] == "validation"]
    outcome: dict[str, Any] = {}
    if losses:
        outcome |= {"tokens": lines[-1]["tokens"], "train_loss": sum(losses[-20:]) / len(losses[-20:])}
    if validations:
        last = validations[-1]
        bits, unigram = last["bits_per_byte"], last["unigram_bits_per_byte"]
        outcome |= {"validation_loss": last["loss"], "bits_per_byte": bits, "unigram_bits_per_byte": unigram}
        outcome["below_unigram"] = 1 - bits / unigram
    return outcome


def _closing(folder: Path, summary: dict[str, Any], sample: str | None = None) -> str:
    """The last words of a run: how it went, what the model writes, and where all of it lies."""
    if summary["status"] == "failed":
        return f"error: {summary['error']}"
    tokens, time_taken = summary.get("tokens", 0), _clock(summary["seconds"])
    text = f"{summary['status']:<10} {summary['steps']} steps, {tokens:,} tokens in {time_taken}"
    if "below_unigram" in summary:
        bits, below = summary["bits_per_byte"], summary["below_unigram"]
        text += f"; validation {bits:.3f} bits/byte, {below:.1%} below the unigram entropy"
    if summary["status"] == "stopped":
        return f"{text}\nto go on    the same command again"
    if sample is not None:
        text += f"\n\n{sample}\n"
    files = [path for name in FILES if (path := folder / name).exists()]
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    lines = [*map(str, files), str(folder / "checkpoints" / latest)]
    return f"{text}\nfiles      " + "\n           ".join(lines) + f"\nmore text  python -m recipes.generate {folder}"


def draw_loss(lines: list[dict[str, Any]], picture: Path, title: str) -> None:
    """Training and validation loss in bits per byte over bytes read, beside the byte-unigram entropy."""
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


def _start_wandb(folder: Path, recipe: Recipe) -> Any:
    import wandb

    run = wandb.init(
        project=recipe.wandb.project,
        group=recipe.wandb.group or recipe.name.split("/")[0],
        name=recipe.name,
        id=json.loads((folder / "provenance.json").read_text())["wandb_id"],
        resume="allow",
        mode=recipe.wandb.mode,
        dir=folder,
        config=config.flat(recipe),
        settings=wandb.Settings(silent=True, console="off", disable_code=True, x_disable_stats=True),
    )
    run.define_metric("*", step_metric="step")
    return run


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def _memory_mb() -> float:
    """Peak memory of this process: on the GPU if it has one, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def _command() -> str:
    """What was typed to start this, up to the order of torchrun's own options."""
    words = sys.orig_argv[1:]
    module = words[words.index("-m") :] if "-m" in words else words
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    return shlex.join((["torchrun", "--nproc-per-node", processes] if processes else ["python"]) + module)


def _git(*arguments: str) -> str | None:
    """What git says about the checkout of this file, or None without git or a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)
