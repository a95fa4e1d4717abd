"""Linear attention by one backend on one device, held against the torch path in fp64 on the same device.

The checks take the device, so that a CPU runs the same ones, in Triton's interpreter and at tiny sizes. Of every tensor
the error is relative, the root mean square over SEEDS. Its bounds, after DESIGN's numerical promise:

    o, dq, dk, dv    at most twice the torch path's error at the dtype, and at most BOUND
    states           at most BOUND: the torch path sums exact inputs in fp32, a backend factors rounded to the dtype
    dg, du           at most twice BOUND: likewise, and sums of differences; dg of fixed decays, a number per head that
                     is a sum over all tokens, four times
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hybrid_sp as hsp
from tests.support.oracle import relative

SEEDS = 4
BOUND = {torch.bfloat16: 5e-3, torch.float16: 6.5e-4, torch.float32: 5e-6}
FLOOR = {
    torch.bfloat16: 0.0,
    torch.float16: 0.0,
    torch.float32: 1e-6,
}  # twice the error of fp32 sums may be less than this
IN_DTYPE = ("o", "dq", "dk", "dv")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call. decay: None, fixed, scalar or vector; `spans` 2 is the zigzag layout of one rank."""

    decay: str | None = "scalar"
    key: int = 64
    value: int = 64
    heads: int = 4
    groups: int = 4
    length: int = 517  # odd, and no multiple of any chunk
    batch: int = 2
    bonus: bool = False
    normalize: bool = False
    states: bool = False
    documents: tuple[int, ...] | None = None
    spans: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        what = [
            str(self.decay),
            str(self.dtype).removeprefix("torch."),
            f"K{self.key}",
            f"V{self.value}",
            f"T{self.length}",
        ]
        what += [word for word in ("bonus", "normalize", "states") if getattr(self, word)]
        what += ["grouped"] * (self.groups < self.heads) + ["documents"] * bool(self.documents)
        return "-".join([*what, *["zigzag"] * (self.spans > 1)])

    def inputs(self, seed: int, device: torch.device) -> dict[str, Tensor]:
        """Leaves: tokens in the dtype, decays, states and the bonus in fp32."""
        make = torch.Generator().manual_seed(seed)
        B, T, H, G, K, V = self.batch, self.length, self.heads, self.groups, self.key, self.value

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=make).to(device, dtype)

        x = {"q": normal(B, T, G, K), "k": normal(B, T, G, K), "v": normal(B, T, H, V)}
        if self.normalize:
            x["q"], x["k"] = x["q"].abs(), x["k"].abs()
        x = {name: value.to(self.dtype) for name, value in x.items()}
        shape = {"fixed": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}
        if self.decay is not None:
            x["g"] = -0.1 * normal(*shape[self.decay]).abs()
        if self.bonus:
            x["u"] = normal(H, K)
        if self.states:
            x["initial"] = normal(B, H, K, V)
            if self.normalize:
                x["initial_z"] = normal(B, H, K).abs()
        return x

    def call(self, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        """o, and the final states if there are any."""
        sp = hsp.SequenceParallel(None, layout="zigzag" if self.spans > 1 else "contiguous")
        initial: Any = x.get("initial")
        out = hsp.linear_attention(
            x["q"],
            x["k"],
            x["v"],
            log_decay=x.get("g"),
            bonus=x.get("u"),
            shard=sp.shard(self.length, self.documents),
            normalize=self.normalize,
            initial_state=(initial, x["initial_z"]) if "initial_z" in x else initial,
            return_final_state=self.states,
            backend=backend,
        )
        if isinstance(out, Tensor):
            return {"o": out}
        finals = out[1] if isinstance(out[1], tuple) else (out[1],)
        return {"o": out[0], **{f"final{i}": final for i, final in enumerate(finals)}}

    def results(self, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        """Outputs, and the gradients of all inputs."""
        leaves = {name: value.detach().requires_grad_() for name, value in x.items()}
        outputs = self.call(leaves, backend)
        given = []
        for i, output in enumerate(outputs.values()):
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(100 + i))
            given.append(weights.to(self.dtype if i == 0 else torch.float32).to(output))
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given)
        found = {name: output.detach() for name, output in outputs.items()}
        return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def errors(problem: Problem, backend: str, device: torch.device, seeds: int = SEEDS) -> dict[str, tuple[float, float]]:
    """Of every tensor the error of the backend and that of the torch path at the same dtype."""
    squares: dict[str, list[float]] = {}
    for seed in range(seeds):
        x = problem.inputs(seed, device)
        truth = problem.results({name: value.double() for name, value in x.items()}, "torch")
        for place, which in enumerate((backend, "torch")):
            got = problem.results(x, which)
            assert got.keys() == truth.keys()
            for name, want in truth.items():
                assert got[name].dtype == (problem.dtype if name in IN_DTYPE else torch.float32), name
                assert torch.isfinite(got[name]).all(), f"{name} of {which} is not finite"
                squares.setdefault(name, [0.0, 0.0])[place] += relative(got[name], want) ** 2 / seeds
    return {name: (both[0] ** 0.5, both[1] ** 0.5) for name, both in squares.items()}


def check_errors(problem: Problem, backend: str, device: torch.device, seeds: int = SEEDS) -> None:
    """Both rules above, for every tensor; says all that break one."""
    bound, wrong = BOUND[problem.dtype], []
    found = errors(problem, backend, device, seeds)
    for name, (got, reference) in found.items():
        allowed = bound
        if name in IN_DTYPE:
            allowed = min(bound, max(2 * reference, FLOOR[problem.dtype]))
        if name in ("dg", "du"):
            allowed *= 4 if name == "dg" and problem.decay == "fixed" else 2
        if not got <= allowed:
            wrong.append(f"{name}: {got:.3g}, allowed {allowed:.3g} (torch {reference:.3g})")
    print(problem, {name: f"{got:.2g} / {reference:.2g}" for name, (got, reference) in found.items()})
    assert not wrong, f"{problem}: {'; '.join(wrong)}"


def check_leak(problem: Problem, backend: str, device: torch.device) -> None:
    """Change one token: nothing before it moves, by not a bit, and it does."""
    x = problem.inputs(0, device)
    before = problem.call(x, backend)["o"]
    last = problem.length - 1
    for t in sorted({1, min(63, last), min(64, last), problem.length // 2, last}):
        other = {name: value.clone() for name, value in x.items()}
        for name in ("q", "k", "v"):
            other[name][:, t] += 1.0
        if problem.decay in ("scalar", "vector"):
            other["g"][:, t] -= 0.1
        after = problem.call(other, backend)["o"]
        assert torch.equal(after[:, :t], before[:, :t]), f"{problem}: token {t} leaks into earlier ones"
        assert not torch.equal(after[:, t], before[:, t]), f"{problem}: token {t} does not see itself"


def check_documents(problem: Problem, backend: str, device: torch.device) -> None:
    """Change all of one document: no other one moves, outputs and gradients, by not a bit."""
    assert problem.documents is not None
    x = problem.inputs(0, device)
    before = problem.results(x, backend)
    for start, end in itertools.pairwise(problem.documents):
        other = {name: value.clone() for name, value in x.items()}
        for name in ("q", "k", "v"):
            other[name][:, start:end] += 1.0
        after = problem.results(other, backend)
        for name in IN_DTYPE:
            for a, b in ((0, start), (end, problem.length)):
                same = torch.equal(after[name][:, a:b], before[name][:, a:b])
                assert same, f"{problem}: document {start} to {end} leaks into {name} of others"
        assert not torch.equal(after["o"][:, start:end], before["o"][:, start:end])


def check_determinism(problem: Problem, backend: str, device: torch.device) -> None:
    """The same call twice gives the same bits."""
    first, second = (problem.results(problem.inputs(0, device), backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{problem}: {name} differs from run to run"


def check_strides(problem: Problem, backend: str, device: torch.device) -> None:
    """Queries, keys and values that are parts of one projection, as layers hand them over, and a gradient likewise."""
    assert problem.groups == problem.heads and problem.key == problem.value
    x = problem.inputs(0, device)
    joined = torch.cat([x[name].flatten(2) for name in ("q", "k", "v")], -1)
    parts = [part.unflatten(-1, (problem.heads, -1)) for part in joined.chunk(3, dim=-1)]
    assert not parts[0].is_contiguous()
    strided = problem.results(x | dict(zip("qkv", parts, strict=True)), backend)
    for name, value in problem.results(x, backend).items():
        assert torch.equal(value, strided[name]), f"{problem}: {name} depends on strides"


def check_strong_decays(problem: Problem, backend: str, device: torch.device) -> None:
    """Tokens that wipe the state, between others that keep it, cost these nothing."""
    x = problem.inputs(0, device)
    x["g"][:, 5::17] = -1e4
    truth = problem.results({name: value.double() for name, value in x.items()}, "torch")
    for name, got in problem.results(x, backend).items():
        assert relative(got, truth[name]) <= 2 * BOUND[problem.dtype], f"{problem}: {name} under strong decays"


def check_pieces(problem: Problem, backend: str, device: torch.device, pieces: int) -> None:
    """The sequence cut unevenly, each piece from the state of the one before: the same as in one piece, with gradients.

    This is what P ranks compute, on one device."""
    x = {name: value.requires_grad_() for name, value in problem.inputs(0, device).items()}
    cuts = [0, *sorted({problem.length * (i + 1) ** 2 // pieces**2 for i in range(pieces)})]
    outputs, state = [], None
    for a, b in itertools.pairwise(cuts):
        here = {name: x[name][:, a:b] for name in ("q", "k", "v")}
        g = x["g"] if problem.decay == "fixed" else x["g"][:, a:b] if "g" in x else None
        o, state = hsp.linear_attention(
            *here.values(), log_decay=g, initial_state=state, return_final_state=True, backend=backend
        )
        outputs.append(o)
    weights = torch.randn(problem.inputs(0, device)["v"].shape, generator=torch.Generator().manual_seed(100))
    given = weights.to(device, problem.dtype)
    grads = torch.autograd.grad(torch.cat(outputs, 1), list(x.values()), given)
    got = {"o": torch.cat(outputs, 1).detach(), **{f"d{name}": d for name, d in zip(x, grads, strict=True)}}
    truth = problem.results({name: value.detach().double() for name, value in x.items()}, "torch")
    for name, value in got.items():
        error = relative(value, truth[name])
        assert error <= BOUND[problem.dtype], f"{problem} in {pieces} pieces: {name} is off by {error:.3g}"


def check_group_of_one(problem: Problem, backend: str, device: torch.device) -> None:
    """A process group of one rank (nccl on CUDA) gives the bits of no group."""
    mesh = hsp.init_mesh(device=device.type)
    try:
        shard = hsp.SequenceParallel(mesh["sp"].get_group(), check="calls").shard(problem.length)
        x = {name: value.requires_grad_() for name, value in problem.inputs(0, device).items()}
        both = []
        for where in (shard, None):
            o = hsp.linear_attention(x["q"], x["k"], x["v"], log_decay=x.get("g"), shard=where, backend=backend)
            assert isinstance(o, Tensor)
            both.append([o, *torch.autograd.grad(o.float().square().sum(), list(x.values()))])
        for a, b in zip(*both, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.distributed.destroy_process_group()


def check_far_addresses(problem: Problem, backend: str, device: torch.device, tail: int) -> None:
    """More numbers in a tensor than an int32 counts: the last tokens, which see as far as the decay lets them."""
    make = torch.Generator(device).manual_seed(0)
    B, T, H, K = problem.batch, problem.length, problem.heads, problem.key
    q, k, v = (torch.randn(B, T, H, K, device=device, dtype=problem.dtype, generator=make) for _ in range(3))
    g = -torch.rand(B, T, H, device=device, generator=make)
    with torch.no_grad():
        o = hsp.linear_attention(q, k, v, log_decay=g, backend=backend)[:, -tail:]
        last = [x[:, -4 * tail :] for x in (q, k, v, g)]
        want = hsp.linear_attention(*(x.double() for x in last[:3]), log_decay=last[3].double(), backend="torch")
    error = relative(o, want[:, -tail:])
    assert error <= BOUND[problem.dtype], f"the last {tail} of {T} tokens are off by {error:.3g}"
