"""The checks on several ranks, with a device each, each in processes of its own:

    python -m tests.gpu.ranks NAME [--ranks 2] [--device cuda]

Exit code 77 and a line that says what is needed where a check cannot be run. On a CPU, with gloo, those run that need
no CUDA. A rank that has not ended at the deadline shows where it is, and ends.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hybrid_sp as hsp
from analysis.bench.device import allow_any_triton
from analysis.bench.ranks.launch import launch
from analysis.bench.ranks.network import loopback
from hybrid_sp.comm import collectives, groups
from hybrid_sp.comm.pending import Header
from hybrid_sp.exchange.auto import measure_link
from hybrid_sp.shard import BASELINES, LAYOUTS, STATE_EXCHANGES
from layers import HybridLM, ModelConfig
from layers.registry import MIXERS
from tests.gpu import ending, syncs
from tests.gpu.attention import two_configurations
from tests.gpu.memcheck import LACKING
from tests.hybrid_sp.cases import SHORT_DOCUMENTS, Case, measured, truth
from tests.support.oracle import relative

DEADLINE = 60.0  # seconds of a rank; longer where kernels of all mixers are compiled
COMPILING = 150.0
TIMEOUT = timedelta(seconds=40)  # of a collective
MESSAGES = tuple(name for name in STATE_EXCHANGES if name != "all_gather")


class Lacking(Exception):
    """What this check needs and does not find here."""


class Place(NamedTuple):
    """Where a check runs; `few` are small sizes and few repetitions."""

    group: Any
    device: torch.device
    few: bool = False

    @property
    def rank(self) -> int:
        return groups.rank(self.group)

    @property
    def size(self) -> int:
        return groups.size(self.group)

    def needs_cuda(self) -> None:
        if self.device.type != "cuda":
            raise Lacking("needs CUDA")


def start(here: Place) -> str:
    """Every rank has a device of its own; collectives in fp64 and of integers, and rows of nothing."""
    rank, size, header = here.rank, here.size, Header(tag="check")
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8):
        x = torch.full((3, 2), rank + 1, dtype=dtype, device=here.device)
        every = collectives.start_all_gather(x, here.group, header).wait()
        assert every[:, 0, 0].tolist() == [r + 1 for r in range(size)], dtype
        if dtype != torch.uint8:
            mine = collectives.start_reduce_scatter(torch.stack([x] * size), here.group, header).wait()
            assert mine[0, 0].item() == size * (size + 1) // 2, dtype
    sent = [(rank + other) % 2 * 3 for other in range(size)]  # rows to each rank: none to half of them
    rows = torch.full((sum(sent), 4), float(rank), dtype=torch.float64, device=here.device)
    got = collectives.start_all_to_all(rows, sent, sent, here.group, header).wait()
    assert got[:, 0].tolist() == [float(r) for r in range(size) for _ in range(sent[r])]
    if here.device.type != "cuda":
        return f"{size} ranks, collectives of 4 dtypes"
    device = torch.cuda.current_device()
    devices = collectives.gather_objects((device, os.getpid()), here.group)
    assert len({device for device, _ in devices}) == size, f"ranks share devices: {devices}"
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader", f"--id={device}"]
    said = subprocess.run(query, capture_output=True, text=True).stdout.split()
    strangers = {str(pid) for _, pid in devices} & set(said) - {str(os.getpid())}
    assert not strangers, f"other ranks have a context on device {device}: {strangers}"
    return f"{size} ranks, devices {[device for device, _ in devices]}; nvidia-smi names {len(said)} processes"


@functools.cache
def wanted(case: Case) -> dict[str, Tensor]:
    return truth(case)


def check_case(case: Case, here: Place, bound: float = 1e-10) -> None:
    """Outputs and gradients of this rank against the token loop in fp64."""
    shard = hsp.SequenceParallel(here.group, layout=case.layout).shard(case.length, case.documents)
    plain = replace(case, layout="contiguous", linear="all_gather", softmax="all_gather")
    for name, got in measured(case, here.group, device=here.device).items():
        want = wanted(plain)[name]
        want = want if want.shape == got.shape else shard.take(want)
        error = relative(got.cpu(), want)
        assert error <= bound, f"rank {here.rank}, {case}: {name} is off by {error:.3g}"


def parity_cases(exchanges: Iterable[str], softmax: Iterable[str], few: bool) -> list[Case]:
    cases = []
    for layout in LAYOUTS:
        for documents in (None, SHORT_DOCUMENTS):
            shape: dict[str, Any] = {"layout": layout, "documents": documents}
            for linear in exchanges:
                decays = ("scalar",) if few else (None, "scalar", "vector")
                cases += [Case(decay=decay, linear=linear, states=True, **shape) for decay in decays]
                cases += [Case(operator="delta", decay="scalar", linear=linear, states=True, **shape)] * (not few)
            cases += [Case(operator="softmax", softmax=kind, **shape) for kind in softmax]
    return cases


def run_cases(cases: Sequence[Case], here: Place) -> str:
    done, refused = 0, []
    for case in cases:
        try:
            check_case(case, here)
            done += 1
        except ValueError as error:  # a baseline refuses what it cannot run, before it communicates
            refused.append(f"{case.softmax if case.operator == 'softmax' else case.linear}: {error}")
    assert done, refused
    return f"{done} calls within 1e-10 of the token loop, {len(refused)} refused"


def parity(here: Place) -> str:
    """Every exchange of states and of keys, both layouts, with and without documents, states handed on."""
    return run_cases(parity_cases(STATE_EXCHANGES, ("all_gather", *BASELINES["softmax"]), here.few), here)


def auto(here: Place) -> str:
    """The measurement of a link ends, its choice is the same on all ranks, and the results are right."""
    begin = time.monotonic()
    link = measure_link(here.group)
    took = time.monotonic() - begin
    assert len(set(collectives.gather_objects(link, here.group))) == 1
    check_case(Case(decay="scalar", linear="auto", states=True), here)
    return f"latency {link.latency * 1e6:.1f} us, {link.bandwidth / 1e9:.2f} GB/s, measured in {took:.2f} s"


def order(here: Place) -> str:
    """The first messages of a run: communicators between pairs are made in the order of their use."""
    if here.size < 3:
        raise Lacking(f"needs 3 or 4 ranks, got {here.size}")
    return run_cases(parity_cases(MESSAGES, ("ring",), here.few), here)


class Layers(NamedTuple):
    """A linear and a softmax layer's inputs on this rank."""

    shard: hsp.Shard
    x: list[Tensor]

    @classmethod
    def draw(cls, here: Place, length: int, **options: Any) -> Layers:
        shard = hsp.SequenceParallel(here.group, **{"layout": "zigzag"} | options).shard(length)
        make, dtype = torch.Generator().manual_seed(here.rank), torch.bfloat16 if here.device.type == "cuda" else None
        x = [torch.randn(1, shard.tokens, 4, 64, generator=make).to(here.device, dtype) for _ in range(3)]
        g = -0.1 * torch.rand(1, shard.tokens, 4, generator=make).to(here.device)
        return cls(shard, [*(y.requires_grad_() for y in x), g.requires_grad_()])

    def run(self) -> list[Tensor]:
        """Outputs and gradients of both layers."""
        q, k, v, g = self.x
        linear = hsp.linear_attention(q, k, v, log_decay=g, shard=self.shard)
        softmax = hsp.softmax_attention(q, k, v, shard=self.shard)
        assert isinstance(linear, Tensor)
        loss = (linear.float().square() + softmax.float().square()).sum()
        return [linear.detach(), softmax.detach(), *torch.autograd.grad(loss, self.x)]


def overlap(here: Place) -> str:
    """Bit-equal with and without overlap, and from call to call."""
    repeats, length = (2, 128) if here.few else (100, 8192)
    for linear in STATE_EXCHANGES:
        want = Layers.draw(here, length, overlap=False, linear=linear).run()
        layers = Layers.draw(here, length, linear=linear)
        for repeat in range(max(1, repeats // len(STATE_EXCHANGES))):
            for i, (a, b) in enumerate(zip(layers.run(), want, strict=True)):
                assert torch.equal(a, b), f"{linear}: tensor {i} differs in repetition {repeat}"
    return f"equal bits, {len(STATE_EXCHANGES)} exchanges"


def stress(here: Place) -> str:
    """Bit-equal while one rank is late by a tenth of a second, and memory is taken and freed beside it."""
    here.needs_cuda()
    for linear in STATE_EXCHANGES:
        layers = Layers.draw(here, 8192, linear=linear)
        want = layers.run()
        for late in range(here.size):
            for _ in range(5):
                if here.rank == late:
                    torch.cuda._sleep(100_000_000)
                blocks = [torch.full((1 << 20,), torch.nan, device=here.device) for _ in range(64)]
                del blocks  # whoever reads what it does not own reads NaN
                for i, (a, b) in enumerate(zip(layers.run(), want, strict=True)):
                    assert torch.equal(a, b), f"{linear}, rank {late} late: tensor {i} differs"
    return f"equal bits, {len(STATE_EXCHANGES)} exchanges, each rank late in turn"


def no_syncs(here: Place) -> str:
    """No mixer stops the host on any rank."""
    here.needs_cuda()
    with two_configurations():
        found = syncs.stops(here.group, here.device, sorted(MIXERS), syncs.LENGTH, syncs.CONTEXT.dim)
    assert not found, found
    return f"{len(MIXERS)} mixers, zigzag, whole and packed"


class Kernel(NamedTuple):
    """A kernel on the device's timeline, in microseconds."""

    name: str
    begin: float
    end: float


def hiding(kernels: Sequence[Kernel]) -> list[tuple[Kernel, float, float]]:
    """Of every kernel of NCCL: how long after the end of the computation before it it began, and which part of it ran
    beside computation."""
    others = sorted((one for one in kernels if "nccl" not in one.name.lower()), key=lambda one: one.begin)
    found = []
    for one in kernels:
        if "nccl" not in one.name.lower():
            continue
        before = max((other.end for other in others if other.end <= one.begin), default=one.begin)
        beside, reached = 0.0, one.begin
        for other in others:
            begin, end = max(other.begin, reached), min(other.end, one.end)
            if end > begin:
                beside, reached = beside + end - begin, end
        found.append((one, one.begin - before, beside / max(one.end - one.begin, 1e-9)))
    return found


def hidden(here: Place) -> str:
    """Every exchange of states runs beside the local work, forward and backward."""
    here.needs_cuda()
    from torch.profiler import ProfilerActivity, profile

    shard = hsp.SequenceParallel(here.group).shard(16384 * here.size)
    x = [torch.randn(1, shard.tokens, 16, 128, device=here.device, dtype=torch.bfloat16) for _ in range(3)]
    leaves = [y.requires_grad_() for y in x]

    def step() -> None:
        o = hsp.linear_attention(*leaves, shard=shard)
        assert isinstance(o, Tensor)
        torch.autograd.grad(o, leaves, torch.ones_like(o))

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    found = hiding([Kernel(event.name, event.time_range.start, event.time_range.end) for event in events])
    words = [
        f"{one.name[:30]} {one.end - one.begin:.0f} us, {late:.0f} us late, {part:.0%} hidden"
        for one, late, part in found
    ]
    if not events:
        raise Lacking("needs a profiler that sees kernels")
    assert len(found) >= 2 and all(part > 0 for _, _, part in found), words
    return "; ".join(words)


def train(here: Place) -> str:
    """Steps of a model cut over ranks, and with a batch each: losses as on one rank, equal weights on all ranks; saved
    and resumed with the same bits; on CUDA, memory that does not grow."""
    steps = 4 if here.few else 20
    torch.manual_seed(0)
    config = ModelConfig(vocab=64, dim=64, depth=4, heads=4, linear="gla", ratio="1/4")
    tokens = torch.randint(64, (here.size, 64 if here.few else 512), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(here.device)

    def run(group: Any, cut: bool, count: int, state: Any = None) -> tuple[list[float], Any]:
        torch.manual_seed(0)
        model = HybridLM(config).to(here.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        mine = tokens if cut or group is None else tokens[here.rank : here.rank + 1]
        sp = hsp.SequenceParallel(group if cut else None, layout="zigzag", linear="pipeline" if cut else "all_gather")
        shard, losses = sp.shard(tokens.shape[1]), []
        for _ in range(count):
            optimizer.zero_grad()
            loss, valid = model.loss(shard.take(mine), shard.labels(mine), shard)
            loss.backward()
            total = hsp.sum_gradients(model.parameters(), group, int(valid))
            optimizer.step()
            losses.append(collectives.all_reduce(loss.detach().double(), group, tag="check").item() / total)
        return losses, (model.state_dict(), optimizer.state_dict())

    want, _ = run(None, False, steps)
    worst = 0.0
    for cut in (True, False):
        got, (weights, _) = run(here.group, cut, steps)
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True)))
        assert worst <= 1e-4, f"{'sp' if cut else 'dp'}: losses {got}, on one rank {want}"
        digests = collectives.gather_objects(digest(weights), here.group)
        assert len(set(digests)) == 1, f"{'sp' if cut else 'dp'}: the weights of ranks differ"
    first, state = run(here.group, True, steps // 2)
    saved = {"state": state}
    with tempfile.TemporaryFile() as file:
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)["state"]
    rest, (weights, _) = run(here.group, True, steps - steps // 2, loaded)
    whole, (other, _) = run(here.group, True, steps)
    assert first + rest == whole and digest(weights) == digest(other), "a resumed run differs"
    if here.device.type == "cuda":
        run(here.group, True, 20)
        before = torch.cuda.memory_reserved()
        run(here.group, True, 200)
        assert torch.cuda.memory_reserved() <= before, f"{before} bytes reserved, then {torch.cuda.memory_reserved()}"
    return f"{steps} steps, losses within {worst:.1g} of one rank, resumed with the same bits"


def digest(weights: dict[str, Tensor]) -> str:
    raw = b"".join(x.detach().cpu().float().contiguous().numpy().tobytes() for x in weights.values())
    return hashlib.sha1(raw).hexdigest()


CHECKS: dict[str, Callable[[Place], str]] = {
    "start": start,
    "parity": parity,
    "auto": auto,
    "order": order,
    "overlap": overlap,
    "stress": stress,
    "syncs": no_syncs,
    "hidden": hidden,
    "train": train,
}


def run_rank(name: str, device: str, words: Path, few: bool) -> None:
    """A check on this rank; rank 0 writes down what it has found."""
    faulthandler.dump_traceback_later(COMPILING if name == "syncs" else DEADLINE, exit=True)
    allow_any_triton()
    torch.use_deterministic_algorithms(True, warn_only=True)
    mesh = hsp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), device=device, timeout=TIMEOUT)
    group = mesh["sp"].get_group()
    here = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    try:
        found = CHECKS[name](Place(group, here, few))
    except Lacking as lack:
        found = str(lack)
    if groups.rank(group) == 0:
        words.write_text(found)
    collectives.leave(group)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.ranks", description=__doc__)
    parser.add_argument("name", choices=[*CHECKS, "loss"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--few", action="store_true", help="small sizes, as on a CPU")
    parser.add_argument("--words", type=Path, help="this process is a rank; the file for what it finds")
    chosen = parser.parse_args(arguments)
    few = chosen.few or chosen.device == "cpu"
    if chosen.words is not None:
        run_rank(chosen.name, chosen.device, chosen.words, few)
        return 0
    found = torch.cuda.device_count()
    if chosen.device == "cuda" and found < chosen.ranks:
        print(f"needs {chosen.ranks} CUDA devices, found {found}")
        return LACKING
    if chosen.name == "loss":
        right, said = ending.check(chosen.ranks, chosen.device, chosen.few)
        print(said)
        return int(not right)
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder, "words")
        command = [sys.executable, "-m", "tests.gpu.ranks", *arguments, "--words", str(words)]
        launch(command, loopback(chosen.ranks))
        said = words.read_text()
    print(said)
    return LACKING if said.startswith("needs ") else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
