"""Time one part of the table of `limit`: ``PYTHONPATH=CHECKOUT python probe.py PART LENGTHS REPETITIONS``.

The program prints a JSON object from "name, length" to seconds. It uses names that earlier commits have too, so that it
can time their checkouts. Part `ranks` needs two processes of torchrun.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import collectives, groups

HEADS, WIDTH, CHUNK = 4, 64, 64
SQUARES, AT_ONCE = 256, 16  # matrices of 64 x 64 in the product that is the ceiling, and products in a row
CEILING = "torch.bmm, 16 times 256 pairs of 64 x 64"
KINDS = ("no decay", "[B,T,H]", "[B,T,H,K]", "delta rule [B,T,H]", "delta rule [B,T,H,K]")
SHORT, PLAIN = "linear_attention, one chunk", "the same in plain torch"
ON_RANKS = "linear_attention, one chunk on each of two ranks"
STEP = "training step of the quickstart's model"
OURS, SDPA = "softmax_attention", "torch SDPA"
Timed = Callable[[], object]


def operator(kind: str, length: int, **options: Any) -> Timed:
    """Return a forward and backward call of an operator with these decays."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, length, HEADS, WIDTH) for _ in range(4))
    gate, beta = F.logsigmoid(torch.randn(1, length, HEADS, WIDTH)) / 16, torch.rand(1, length, HEADS)
    if kind.startswith("delta"):
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    given: dict[str, Tensor] = {"q": q, "k": k, "v": v}
    if kind != "no decay":
        given["log_decay"] = gate if kind.endswith("K]") else gate[..., 0].contiguous()
    if kind.startswith("delta"):
        given["beta"] = beta
    call: Any = hsp.delta_rule if kind.startswith("delta") else hsp.linear_attention
    given = {name: x.requires_grad_() for name, x in given.items()}
    return lambda: torch.autograd.grad(call(**given, **options), list(given.values()), do)


def plain(length: int) -> Timed:
    """Return linear attention by chunks, forward and backward, in a dozen lines of torch."""
    torch.manual_seed(0)
    leaves = [torch.randn(1, length, HEADS, WIDTH).requires_grad_() for _ in range(3)]
    do, causal = torch.randn(1, length, HEADS, WIDTH), torch.ones(CHUNK, CHUNK).tril()

    def run() -> object:
        q, k, v = (x.transpose(1, 2).unflatten(2, (-1, CHUNK)) for x in leaves)
        added = k.mT @ v
        states = added.cumsum(2) - added
        o = (q @ k.mT * causal) @ v + q @ states
        o = (o * WIDTH**-0.5).flatten(2, 3).transpose(1, 2)
        return torch.autograd.grad(o, leaves, do)

    return run


def shares(lengths: Sequence[int]) -> dict[tuple[str, int], Timed]:
    """List the operators, and the product of matrices that is their ceiling."""
    a, b = torch.randn(2, SQUARES, CHUNK, CHUNK)
    out = torch.empty_like(a)
    cases: dict[tuple[str, int], Timed] = {(CEILING, CHUNK): lambda: [torch.bmm(a, b, out=out) for _ in range(AT_ONCE)]}
    return cases | {(kind, length): operator(kind, length) for length in lengths for kind in KINDS}


def small(lengths: Sequence[int]) -> dict[tuple[str, int], Timed]:
    """List one short call and the same mathematics in plain torch, on one thread."""
    torch.set_num_threads(1)
    return {(SHORT, CHUNK): operator("no decay", CHUNK), (PLAIN, CHUNK): plain(CHUNK)}


def growth(lengths: Sequence[int]) -> dict[tuple[str, int], Timed]:
    """List operators at a short and a long sequence; memory is left to the allocator's own ways."""
    return {(kind, length): operator(kind, length) for kind in ("[B,T,H]", KINDS[3]) for length in lengths}


def softmax(lengths: Sequence[int]) -> dict[tuple[str, int], Timed]:
    """List causal softmax attention, ours and torch's."""
    torch.manual_seed(0)
    length, leaves = lengths[0], [torch.randn(1, lengths[0], HEADS, WIDTH).requires_grad_() for _ in range(3)]
    do = torch.randn(1, length, HEADS, WIDTH)
    by_head = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves]
    do_by_head = do.transpose(1, 2).contiguous()
    sdpa: Any = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    return {
        (OURS, length): lambda: torch.autograd.grad(hsp.softmax_attention(*leaves), leaves, do),
        (SDPA, length): lambda: torch.autograd.grad(sdpa(*by_head), by_head, do_by_head),
    }


def phases(length: int, repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of each phase of the operators, by the ledger. An initial state makes them as on ranks."""
    seconds: dict[str, list[float]] = {}
    for kind in KINDS:
        run = operator(kind, length, initial_state=torch.zeros(1, HEADS, WIDTH, WIDTH))
        for repetition in range(-2, repetitions):
            with hsp.ledger() as book:
                run()
            for phase in book.phases if repetition >= 0 else ():
                name = f"{kind}, {phase.name} {phase.direction}, {length}"
                seconds.setdefault(name, []).append(phase.end - phase.begin)
    return seconds


def ranks(length: int, repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of one short call on two ranks, without its waits, and those of plain torch on one."""
    torch.set_num_threads(1)
    group = hsp.init_mesh(sp=2)["sp"].get_group()
    run, alone = operator("no decay", length, shard=hsp.SequenceParallel(group).shard(2 * length)), plain(length)
    seconds: dict[str, list[float]] = {f"{ON_RANKS}, {length}": [], f"{PLAIN}, {length}": []}
    for repetition in range(-2, repetitions):
        collectives.barrier(group)
        begin = time.perf_counter()
        with hsp.ledger() as book:
            run()
        called = time.perf_counter() - begin - book.blocked_seconds
        collectives.barrier(group)
        begin = time.perf_counter()
        alone()
        for values, value in zip(seconds.values(), (called, time.perf_counter() - begin), strict=True):
            if repetition >= 0:
                values.append(value)
    first = groups.rank(group) == 0
    collectives.leave(group)
    return seconds if first else {}


def memory(length: int, repetitions: int) -> dict[str, list[float]]:
    """Return the peak of the bytes that a call adds to its inputs, and a training step to weights and optimizer."""
    from analysis.bench.meter import Meter

    peaks: dict[str, list[float]] = {}
    for name, run in [*((kind, operator(kind, length)) for kind in KINDS), (STEP, training_step(length))]:
        run()
        with Meter() as meter:
            run()
        peaks[f"{name}, {length}"] = [float(meter.peak)]
    return peaks


def training_step(length: int) -> Timed:
    """Return a training step of the quickstart's model."""
    import recipes
    from layers.model import HybridLM
    from recipes.load import load_recipe

    torch.manual_seed(0)
    model = HybridLM(load_recipe(f"{recipes.__path__[0]}/quickstart.yaml").model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(256, (1, length))

    def run() -> None:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


PARTS = {part.__name__: part for part in (shares, small, growth, softmax)}  # whose cases take turns
ALONE = {part.__name__: part for part in (phases, ranks, memory)}


def main(part: str, lengths: str, repetitions: str) -> None:
    """Let the cases of a part take turns, and print their seconds."""
    torch.set_num_threads(2)
    if part != "growth":
        from recipes.allocator import keep_freed_memory

        keep_freed_memory()
    if part in ALONE:
        (length,) = json.loads(lengths)
        if found := ALONE[part](length, int(repetitions)):
            print(json.dumps(found))
        return
    cases = PARTS[part](json.loads(lengths))
    seconds: dict[str, list[float]] = {f"{name}, {length}": [] for name, length in cases}
    for repetition in range(-2, int(repetitions)):
        for (name, length), run in cases.items():
            begin = time.perf_counter()
            run()
            if repetition >= 0:
                seconds[f"{name}, {length}"].append(time.perf_counter() - begin)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
