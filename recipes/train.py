"""Train a recipe: ``python -m recipes.train RECIPE [key=value ...]``, plain or under torchrun.

``--dry-run`` prints the resolved recipe and trains nothing.

One loop serves every recipe. Rank (d, s) of the mesh dp x sp takes shard s of every sequence of replica d. It sums the
losses of its tokens. Gradients and token counts are summed over all ranks and accumulation before the one division
(hybrid_sp.sum_gradients). The load of experts is balanced by counts over all ranks (layers.balance).

Modules that read and write checkpoints are imported where they are needed, for a dry run has no use for their second.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

import hybrid_sp as hsp
from hybrid_sp.comm import collectives, groups
from hybrid_sp.comm.trace import rank_events
from hybrid_sp.mesh import DeviceMesh, whole_group
from hybrid_sp.transfer import to_device
from layers.balance import Balance
from layers.config import expand_pattern, model_facts, parameters_by_kind, pattern_letters
from layers.model import HybridLM
from layers.moe import Routing
from recipes import config, data, optim, record, tracker
from recipes.config import Recipe, RecipeError
from recipes.device import choose_device, set_up
from recipes.load import dump, load_recipe
from recipes.record import TrainingStopped
from recipes.strategy import Strategy, strategy, with_link
from recipes.validate import mesh_shape, processes, untrainable, validate, validate_shape

if TYPE_CHECKING:
    from recipes import checkpoint

TRACED = 3  # `train.trace` shows this step after the start of the program; the steps before warm up
# A closed terminal sends SIGHUP, Slurm SIGUSR1.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 30.0  # seconds that other ranks give the first one to print the error in the recipe


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 finished or stopped by a signal, 1 failed, 2 wrong recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.train",
        usage=argparse.SUPPRESS,  # keeps an error on one line
        description="Trains RECIPE: python -m recipes.train RECIPE [key=value ...], alone or behind torchrun.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as train.steps=20")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe, in one process; train nothing"
    )
    chosen = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(chosen.recipe, chosen.overrides)
        if chosen.dry_run:
            record.say(dry_run(recipe))
            return 0
        train(recipe)
        collectives.leave(None)  # every rank has reached the end of `train`
    except RecipeError as error:
        if not record.is_main_process():
            time.sleep(PATIENCE)  # torchrun ends this process once the first rank has exited
        record.say(f"error: {error}", sys.stderr)
        return 2
    except TrainingStopped:
        return 1
    return 0


def dry_run(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, with the size of model, data and training in comments; no process group.

    Raise RecipeError if the recipe cannot be run on WORLD_SIZE (1) processes. A model of a published size, whose words
    are no bytes, is described all the same, with a note.
    """
    validate_shape(recipe, processes())
    facts, length, dtype = model_facts(recipe.model), recipe.data.length, getattr(torch, recipe.train.dtype)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in parameters_by_kind(recipe.model).items())
    active = f"; {facts.active_parameters:,} active for a token" * bool(facts.idle_params)
    cost = (
        f"cost       {facts.flops(length) / length / 1e6:,.2f} million FLOPs per token forward; "
        f"{facts.state_bytes(1, length, dtype):,} bytes of decoding cache after {length} tokens, of which "
        f"{facts.state_bytes(1, 0, dtype):,} are state"
    )
    lines = [*describe(recipe, data.read_corpus(recipe.data)), f"parameters {kinds}{active}", cost]
    lines += [f"note       {said}, so this recipe does not train here"] if (said := untrainable(recipe)) else []
    return dump(recipe) + "\n".join(f"# {line}" for line in lines)


def describe(recipe: Recipe, corpus: data.Corpus) -> tuple[str, str, str]:
    """Describe a run in three lines: its model, its data and its training."""
    train, names = recipe.train, expand_pattern(recipe.model)
    return (
        f"model      {pattern_letters(names)} ({', '.join(names)}), "
        f"{model_facts(recipe.model).parameters:,} parameters, {train.dtype}",
        f"data       {len(corpus.train):,} bytes to train on and {len(corpus.validation):,} held out, of "
        f"{corpus.files} files ({corpus.rule}); byte-unigram entropy {corpus.unigram_bits:.3f} bits/byte",
        f"training   {train.steps} steps of {train.batch} x {recipe.data.length} = "
        f"{train.batch * recipe.data.length:,} tokens{', files packed as documents' * recipe.data.pack}",
    )


def train(recipe: Recipe) -> dict[str, Any]:
    """Train a recipe on this process, or on all processes of torchrun, and return the content of ``summary.json``.

    Raise RecipeError, before any process group exists, if the recipe cannot be run. Raise TrainingStopped on every
    rank for a loss or gradient that is not finite, for parameters that differ between ranks, or for a failed save.
    """
    from recipes import checkpoint

    world = processes()
    validate(recipe, world)
    device = choose_device(recipe)
    if record.is_main_process():
        tracker.check(recipe)
    corpus = data.read_corpus(recipe.data)
    folder = config.run_folder(recipe)
    record.check_same_run(folder, recipe, corpus.fingerprint)
    if (summary := record.finished(folder, recipe)) is not None:
        return summary
    set_up(recipe, device, folder)
    dp, ranks = mesh_shape(recipe, world)
    parallel, cuda = recipe.parallel, device == "cuda"
    mesh = hsp.init_mesh(
        dp=dp,
        sp=ranks,
        device=device,
        timeout=timedelta(seconds=parallel.timeout),
        eager=cuda and parallel.nccl_eager,
        gather_ctas=parallel.nccl_ctas if cuda else None,
    )
    group = whole_group(mesh)
    if len(set(collectives.gather_objects(corpus.fingerprint, group))) > 1:
        raise RecipeError("data.files: processes read different text; give every machine the same files and Python")
    sp = with_link(config.sequence_parallel(recipe, mesh["sp"].get_group()), group)
    records = record.Record(folder, recipe)
    exchange = strategy(recipe, sp)
    facts = {
        "dp": dp,
        "sp": ranks,
        "world": world,
        "layout": config.layout(recipe),
        "device": device,
        "exchange": exchange.facts(),
        "corpus": {"fingerprint": corpus.fingerprint, "files": corpus.files, "bytes": len(corpus.train)},
    }
    checkpoint.on_first_rank(lambda: records.prepare(facts), group)
    run = Run(recipe, corpus, records, mesh, group, sp, device)
    run.log_header(exchange)
    try:
        stopped = run.loop()
    except Exception as error:
        records.fail(run.facts(), str(error))
        if isinstance(error, TrainingStopped):
            collectives.barrier(group)  # no rank may end before the first one has printed the cause
        raise
    status, write = ("stopped", None) if stopped else ("finished", run.sample)
    return checkpoint.on_first_rank(lambda: records.finish(status, run.facts(), write), group)


class Run:
    """Hold a training run on this rank: its model, its optimiser and its progress."""

    def __init__(
        self,
        recipe: Recipe,
        corpus: data.Corpus,
        records: record.Record,
        mesh: DeviceMesh,
        group: collectives.Group,
        sequence_parallel: hsp.SequenceParallel,
        device: str,
    ) -> None:
        """Start from the newest sound checkpoint of the run folder, or else from fresh weights."""
        from recipes import checkpoint

        self.recipe, self.corpus, self.record, self.group, self.device = recipe, corpus, records, group, device
        self.rank = groups.rank(group)
        self.replica, self.replicas = mesh.get_local_rank("dp"), mesh["dp"].size()
        self.sequence_parallel = sequence_parallel
        self.model = HybridLM(recipe.model, config.recomputed_blocks(recipe.model, recipe.train))
        self.model.init_weights(recipe.train.seed)
        self.model.to(device=device, dtype=getattr(torch, recipe.train.dtype))
        torch.manual_seed(recipe.train.seed * 1_000_003 + self.rank)  # every rank has random numbers of its own
        self.optimizer = optim.Optimizer(self.model, recipe.optim)
        self.balance = Balance(self.model, group)
        self.since = time.perf_counter()  # the last read of a loss, or the start of training
        self.progress = {"step": torch.tensor(0), "seconds": torch.tensor(0.0, dtype=torch.float64)}
        self.checkpoints = config.run_folder(recipe) / "checkpoints"
        self.found = checkpoint.find(self.checkpoints, group)
        if self.found.path is not None:
            state = self.state()
            checkpoint.load(self.found.path, state, group)
            checkpoint.set_random_state(state["rng"])
            self.optimizer.publish()
        self.traced = min(self.step + TRACED, recipe.train.steps) if recipe.train.trace else None
        checkpoint.on_first_rank(lambda: records.begin(self.step), group)

    @property
    def step(self) -> int:
        """Return the number of optimiser steps done."""
        return int(self.progress["step"])

    def log_header(self, exchange: Strategy) -> None:
        """Print the run, its model, mesh, data and training, and the step at which it resumes."""
        world, sp = groups.size(self.group), self.sequence_parallel
        model, corpus, training = describe(self.recipe, self.corpus)
        self.record.say(
            f"run        {config.run_folder(self.recipe)}\n"
            f"{model}\n"
            f"mesh       {world} process{'es' * (world > 1)} on {self.device}: dp {self.replicas} x sp {sp.size}, "
            f"{sp.layout} layout, {torch.get_num_threads()} CPU threads each\n"
            f"exchange   {exchange}\n"
            f"{corpus}\n"
            f"{training}"
        )
        for complaint in self.found.complaints:
            self.record.say(f"WARNING    {complaint}")
        if self.step:
            self.record.say(f"resuming   after step {self.step}, from {self.found.path}")

    def facts(self) -> dict[str, Any]:
        """Return the part of the summary that the metrics do not hold."""
        return {
            "steps": self.step,
            "seconds": round(float(self.progress["seconds"]), 2),
            "parameters": model_facts(self.recipe.model).parameters,
            "pattern": pattern_letters(expand_pattern(self.recipe.model)),
        }

    def state(self) -> checkpoint.State:
        """Return the tensors that a resumed run needs; they share memory with the run, but random states are copies."""
        from recipes import checkpoint

        return {**self.optimizer.state(), "progress": self.progress, "rng": checkpoint.random_state(self.rank)}

    def loop(self) -> bool:
        """Train to the last step, or stop after a step in which a signal reached any rank; return True if stopped."""
        train, saving = self.recipe.train, self.recipe.checkpoint
        stop = False
        gc.collect()
        gc.freeze()  # automatic collections would look through all that was imported, again and again
        self.since = time.perf_counter()
        with _stop_signals() as asked:
            while self.step < train.steps and not stop:
                begin = time.perf_counter()
                stop = self.train_step(self.step + 1, bool(asked))
                last = self.step == train.steps
                validate = last or self.step % train.validate_every == 0
                save = last or stop or self.step % saving.every == 0
                if (validate or save) and self.device == "cuda":
                    torch.cuda.synchronize()  # the kernels of the optimiser belong to the step, the rest does not
                pause = time.perf_counter()
                if validate or save:
                    self.compare_parameters()
                if validate:
                    self.validate()
                self.progress["seconds"] += time.perf_counter() - begin
                if save:
                    self.save()
                self.since += time.perf_counter() - pause
        return stop and self.step < train.steps

    def save(self) -> None:
        """Save the metrics and then a checkpoint; if either fails, every rank raises TrainingStopped."""
        from recipes import checkpoint

        try:
            checkpoint.on_first_rank(self.record.flush, self.group)
            checkpoint.save(self.checkpoints, self.step, self.state(), self.recipe.checkpoint.keep, self.group)
        except OSError as error:
            raise TrainingStopped(
                f"step {self.step}: {error}. Stopped on all ranks; the checkpoints before are sound: mend that, make "
                "room, and start the same command again"
            ) from error

    def train_step(self, step: int, stop: bool) -> bool:
        """Take one optimiser step over all ranks and accumulation; return True if any rank was asked to stop.

        Tokens per second are measured from one read of the loss to the next, so they include the optimiser.
        """
        recipe, train = self.recipe, self.recipe.train
        lr = optim.learning_rate(recipe.optim, step, train.steps)
        with hsp.ledger() as book:
            local = torch.zeros(2, dtype=torch.float64, device=self.device)  # summed loss, request to stop
            valid = torch.zeros((), dtype=torch.int64, device=self.device)
            for indices in self.shares(train.batch // train.accumulation, train.accumulation):
                windows = data.training_windows(self.corpus, recipe.data.length, train.seed, step, indices)
                routing: list[Routing] | None = [] if self.balance.needed else None
                loss, count = self.loss(windows, routing)
                (loss if routing is None else loss + self.balance.loss(routing, count)).backward()
                self.optimizer.collect()
                local[0] += loss.detach()
                valid += count
            total = hsp.sum_gradients(self.optimizer.masters.values(), self.group, valid)
            local[1] = stop
            sums = collectives.all_reduce(local, self.group, tag="loss")
            # All that the host needs to know, in one read: on a GPU it waits here, and nowhere else in a step.
            load = [self.balance.busiest().double()] if self.balance.needed else []
            loss_sum, stops, tokens, norm, *busiest = torch.stack(
                [*sums, total.double(), self.optimizer.clip().double(), *load]
            ).tolist()
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        if tokens == 0:
            raise TrainingStopped(f"step {step}: no rank has a valid token; the loss has no mean. Stopped on all ranks")
        loss_mean, traffic = loss_sum / tokens, record.communication(book)
        if not (math.isfinite(loss_mean) and math.isfinite(norm)):  # both are equal on all ranks
            raise TrainingStopped(
                f"step {step}: loss {loss_mean}, gradient norm {norm}: not finite. Stopped on all ranks; the step was "
                "not taken and nothing was saved. Lower optim.lr or raise optim.warmup under a new name"
            )
        self.optimizer.step(lr)
        if self.balance.needed:
            self.balance.step()
        self.progress["step"].fill_(step)
        step_tokens = train.batch * recipe.data.length
        self.record.train(
            {
                "step": step,
                "loss": loss_mean,
                "grad_norm": norm,
                "lr": lr,
                "tokens": step * step_tokens,
                "tokens_per_second": round(step_tokens / seconds, 1),
                **({"expert_load": busiest[0]} if busiest else {}),  # of the busiest expert, over the mean
                **traffic,
            }
        )
        if step == self.traced:
            self.record.trace(collectives.gather_objects(rank_events(book, self.rank), self.group))
        return stops > 0

    def shares(self, sequences: int, parts: int = 1) -> Iterator[range]:
        """Yield this replica's share of each of ``parts`` groups of ``sequences``; the indices do not depend on dp."""
        share = sequences // self.replicas
        for part in range(parts):
            start = part * sequences + self.replica * share
            yield range(start, start + share)

    def loss(self, windows: data.Windows, routing: list[Routing] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss, in nats, and the number of valid tokens of this rank's shard.

        With data.pack all sequences are one long row. `routing` is extended by the statistics of experts.
        """
        tokens_BL, cu_seqlens = to_device(windows.tokens, self.device), None
        if self.recipe.data.pack:
            tokens_BL, cu_seqlens = tokens_BL.view(1, -1), windows.cu_seqlens
        shard = self.sequence_parallel.shard(tokens_BL.shape[1], cu_seqlens)
        return self.model.loss(shard.take(tokens_BL, dim=1), shard.labels(tokens_BL), shard, routing)

    @torch.no_grad()
    def validate(self) -> None:
        """Record the mean loss per predicted byte of the held-out windows.

        Losses and counts are summed over all ranks before the one division.
        """
        train, length = self.recipe.train, self.recipe.data.length
        (share,) = self.shares(train.validation_sequences)
        at_once = train.batch // (self.replicas * train.accumulation)  # training fits as many
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for start in range(0, len(share), at_once):
            indices = share[start : start + at_once]
            windows = data.validation_windows(self.corpus, length, train.validation_sequences, indices)
            sums += torch.stack([part.double() for part in self.loss(windows)])
        loss_sum, valid = collectives.all_reduce(sums, self.group, tag="loss").tolist()
        self.record.validation(
            {
                "step": self.step,
                "tokens": self.step * train.batch * length,
                "loss": loss_sum / valid,
                "bits_per_byte": data.nats_to_bits(loss_sum / valid),
                "unigram_bits_per_byte": self.corpus.unigram_bits,
            }
        )

    def compare_parameters(self) -> None:
        """Raise TrainingStopped on every rank if any parameter differs in any bit between ranks."""
        weights = self.optimizer.state()["model"]
        every = collectives.gather_objects({name: _digest(p) for name, p in weights.items()}, self.group)
        for name in weights:
            ranks: dict[str, list[int]] = {}
            for rank, digests in enumerate(every):
                ranks.setdefault(digests[name], []).append(rank)
            if len(ranks) > 1:
                held = "; ".join(f"ranks {who} hold {digest}" for digest, who in ranks.items())
                raise TrainingStopped(
                    f"step {self.step}: parameter {name} differs between ranks: {held}. Stopped on all ranks; nothing "
                    "was saved, and the last checkpoint was sound"
                )

    def sample(self) -> str | None:
        """Let the trained model write a text; this needs no other rank."""
        from recipes import generate

        length, seed = self.recipe.train.sample, self.recipe.train.seed
        return generate.generate(self.model, generate.PROMPT, length, seed=seed) if length else None


def _digest(parameter: torch.Tensor) -> str:
    content = parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()[:16]


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect requests to stop in a list; a second signal of the same kind has its usual effect."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {
        number: signal.signal(number, ask)
        for number in STOP_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN  # nohup ignores SIGHUP
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
