"""backend="triton" of linear attention, interpreted on the CPU, against the token loop: outputs and every gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.comm import groups
from tests.hybrid_sp.cases import Case, measured, truth
from tests.hybrid_sp.ops.test_parity import Seeds, check_low_precision, with_one_device
from tests.support.oracle import assert_close
from tests.support.ranks import run_ranks
from tests.support.tiers import tiered

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

ROOT = Path(__file__).parents[3]
LENGTH = 43
SHORT, LONG = (0, 1, 14, 15, 29, 30, 33, 43), (0, 3, 37, 43)  # documents
NAMED = {
    "none": Case(heads=2, groups=2, states=True, layout="zigzag"),
    "fixed": Case(heads=4, groups=2, documents=SHORT, decay="fixed"),
    "scalar": Case(heads=2, groups=2, states=True, decay="scalar"),
    "normalized": Case(heads=2, groups=1, states=True, documents=LONG, decay="scalar", normalize=True, layout="zigzag"),
    "vector": Case(heads=2, groups=1, states=True, decay="vector"),
    "bonus": Case(heads=2, groups=2, documents=SHORT, decay="vector", bonus=True),
    "bonus, normalized": Case(heads=2, groups=1, bonus=True, normalize=True),
    "bonus, scalar": Case(heads=2, groups=2, decay="scalar", bonus=True),
    "scalar, strong": Case(heads=2, groups=2, states=True, decay="scalar", strong="some", layout="zigzag"),
    "vector, strong": Case(heads=2, groups=1, documents=LONG, states=True, decay="vector", strong="some"),
}
CASES = {name: replace(case, backend="triton", length=LENGTH) for name, case in NAMED.items()}
SLOW = ("bonus", "bonus, scalar")


@contextmanager
def small(chunk: int) -> Iterator[None]:
    """Chunks of so many tokens, and segments of two, so that little work has many of both. Spans are folded as on a
    GPU."""
    from hybrid_sp.exchange import affine
    from hybrid_sp.kernels.gpu import linear, segments, tuning
    from tests.support.interpreter import mend

    mend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "scan_chunk", lambda dtype: chunk)
        patch.setattr(segments, "SHORTEST", 2)
        patch.setattr(tuning, "PROGRAMS", 1 << 20)
        patch.setattr(affine, "in_few_launches", lambda state: True)
        try:
            yield
        finally:
            segments.segment.cache_clear()


def check_cases(group: Any, cases: list[tuple[Case, dict[str, Tensor]]]) -> int:
    with small(16):
        for case, want in cases:
            shard = hsp.SequenceParallel(group, layout=case.layout).shard(case.length, case.documents)
            for name, value in measured(case, group, torch.float32).items():
                expected = want[name] if value.shape == want[name].shape else shard.take(want[name])
                where = f"{case} {name} on rank {groups.rank(group)}"
                assert_close(where, value.double(), expected, 2e-6)
    return len(cases)


@pytest.mark.parametrize("name", tiered([name for name in CASES if name not in SLOW], SLOW))
def test_parity_fp32_on_one_device(name: str) -> None:
    """Of one span, in which a state goes from segment to segment, or of two that exchange theirs."""
    check_cases(None, [(CASES[name], truth(CASES[name], torch.float32))])


def on_ranks(world: int, cases: list[Case]) -> None:
    given = [(case, truth(case, torch.float32)) for case in cases]
    assert run_ranks(check_cases, world, given, deadline=600) == [len(given)] * world


def test_parity_fp32() -> None:
    short = {"length": 26, "heads": 1, "groups": 1, "documents": None, "layout": "zigzag"}
    on_ranks(2, [replace(CASES[name], **short) for name in ("scalar", "vector", "normalized")])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_parity_fp32_of_every_form(world: int) -> None:
    layout = "contiguous" if world == 3 else "zigzag"
    on_ranks(world, [replace(case, layout=layout) for case in CASES.values()])


def check_bytes(group: Any) -> None:
    with small(16):
        shard = hsp.SequenceParallel(group).shard(20)
        x, bonus = torch.randn(1, shard.tokens, 1, 16), torch.randn(1, 16)
        scalar, vector = (1, shard.tokens, 1), (1, shard.tokens, 1, 16)
        for decay, u in ((None, None), (None, bonus), ((1,), None), (scalar, None), (scalar, bonus), (vector, None)):
            g = None if decay is None else -torch.rand(decay)
            sent = []
            for backend in ("torch", "triton"):
                with hsp.ledger() as book:
                    leaves = [x.clone().requires_grad_() for _ in range(3)]
                    o = hsp.linear_attention(*leaves, log_decay=g, bonus=u, shard=shard, backend=backend)
                    torch.autograd.grad(o.sum(), leaves)
                sent.append([(row.collective, row.direction, row.bytes) for row in book.rows])
            assert sent[0] == sent[1], f"decay {decay}, bonus {u is not None}"


def test_as_much_is_sent_as_by_torch() -> None:
    run_ranks(check_bytes, 2, deadline=300)


def check_missing(group: Any) -> None:
    with hsp.ledger() as book:
        for linear in ("all_gather", "ulysses"):
            shard = hsp.SequenceParallel(group, linear=linear).shard(20)
            x = torch.randn(1, shard.tokens, 2, 16)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, "hybrid_sp.kernels.gpu.linear", None)
                patch.delattr("hybrid_sp.kernels.gpu.linear", raising=False)
                with pytest.raises(ImportError, match='pass backend="torch"'):
                    hsp.linear_attention(x, x, x, shard=shard, backend="triton")
    assert not book.calls


def test_a_missing_package_is_missed_before_any_communication() -> None:
    run_ranks(check_missing, 2)


def check_bf16(group: Any, cases: list[tuple[Case, Seeds, Seeds]]) -> None:
    with small(32):
        check_low_precision(group, cases, torch.bfloat16)


@pytest.mark.parametrize("documents", tiered([LONG], [(None,)]), ids=["packed", "batch"])
def test_bf16_on_two_ranks_errs_at_most_twice_as_much(documents: tuple[int, ...] | None) -> None:
    """And on one device at most 5e-3, also where a normaliser makes dq the difference of two greater numbers."""
    case = replace(CASES["normalized"], documents=documents, heads=1)
    truths = [truth(replace(case, seed=seed), torch.bfloat16) for seed in range(2)]
    with small(32):
        given = with_one_device([(case, truths)], torch.bfloat16)
    run_ranks(check_bf16, 2, given, deadline=600)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_nothing_leaks_from_later_tokens(decay: str) -> None:
    """Outputs before a token that is changed stay as they are, bit by bit; those after it in its document do not."""
    with small(16):
        case = replace(CASES["scalar"], decay=decay, states=False)
        x, changed = case.inputs(torch.float32), 37
        before, _ = case.call(x, None)
        for name in ("q", "k", "v", "log_decay"):
            x[name] = x[name].clone()
            x[name][:, changed] *= 1.5
        after, _ = case.call(x, None)
    assert torch.equal(after[:, :changed], before[:, :changed])
    assert (after[:, changed:] != before[:, changed:]).any(-1).all()


def test_strides_that_layers_make_are_read_as_they_are() -> None:
    """q, k, v as slices of one projection, heads before tokens, and a decay that is the same for all tokens."""
    with small(16):
        torch.manual_seed(0)
        together = torch.randn(1, 40, 2, 3 * 8)
        q, k, v = together.split(8, dim=-1)
        by_head = v.transpose(1, 2).contiguous().transpose(1, 2)
        g = torch.tensor(-0.1).expand(1, 40, 2)
        got = hsp.linear_attention(q, k, by_head, log_decay=g, backend="triton")
        want = hsp.linear_attention(q, k, v, log_decay=g, backend="torch")
    assert isinstance(got, Tensor) and isinstance(want, Tensor)
    assert_close("o", got, want, 1e-6)


def test_fp16_does_not_overflow_in_the_state() -> None:
    """Positive features of many tokens add up to more than fp16 holds, and the outputs are within its range."""
    with small(64):
        q = torch.full((1, 600, 1, 16), 0.01, dtype=torch.float16)
        k = v = torch.full((1, 600, 1, 16), 20.0, dtype=torch.float16)
        o = hsp.linear_attention(q, k, v, scale=0.01, backend="triton")
        want = hsp.linear_attention(q.double(), k.double(), v.double(), scale=0.01, backend="torch")
    assert isinstance(o, Tensor) and isinstance(want, Tensor)
    assert_close("o", o.double(), want, 1e-3)


def test_gradients_come_to_kernels_in_the_dtype_of_o(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where states enter and o is summed in fp32: a factor in fp32 costs a kernel second products."""
    from hybrid_sp.kernels.gpu import linear

    seen, scan = [], linear.scan

    def record(x: Tensor, y: Tensor | None, z: Tensor | None, *rest: Any, **options: Any) -> Tensor:
        seen.extend(array.dtype for array in (x, y, z) if array is not None)
        return scan(x, y, z, *rest, **options)

    monkeypatch.setattr(linear, "scan", record)
    with small(16):
        q, k, v = (torch.randn(1, 20, 1, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        o, _ = hsp.linear_attention(q, k, v, return_final_state=True, backend="triton")
        o.sum().backward()
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("decay", tiered(["scalar"], ["vector"]))
def test_fp16_gradients_of_decays_bear_great_states(decay: str) -> None:
    q, k, v, do = (torch.full((1, 640, 1, 16), x, dtype=torch.float16) for x in (0.005, 20.0, 20.0, 0.005))
    g = torch.full((1, 640, 1, 16)[: 4 if decay == "vector" else 3], -1e-4)
    found = []
    with small(64):
        for backend, dtype in (("triton", torch.float16), ("torch", torch.float64)):
            g_ = g.to(torch.float32 if backend == "triton" else dtype).requires_grad_()
            o = hsp.linear_attention(*(x.to(dtype) for x in (q, k, v)), log_decay=g_, scale=0.01, backend=backend)
            found.append(torch.autograd.grad(o, g_, do.to(dtype))[0].double())
    assert_close("dg", *found, 1.3e-3)


def test_gradients_of_normalised_outputs_under_decays_per_channel() -> None:
    """Twice the error of torch's path: what numerator and denominator give to q and k nearly cancels."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, 160, 1, 16) for _ in range(4))
    g, found = -torch.rand(1, 160, 1, 16) * 0.05, []
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float64)):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (q.exp() * 0.3, k.exp() * 0.3, v)]
        with small(64):
            o = hsp.linear_attention(*leaves, log_decay=g, normalize=True, backend=backend)
            found.append([x.double() for x in torch.autograd.grad(o, leaves, do.bfloat16().to(dtype))])
    for name, got, reference, want in zip(("dq", "dk", "dv"), *found, strict=True):
        assert (got - want).norm() <= 2 * (reference - want).norm(), name


@pytest.mark.parametrize("size", [0.02, 30.0])
def test_fp16_gradients_of_normalised_outputs_have_any_size(size: float) -> None:
    """That of the numerator is do over the denominator, in fp32: more, or less, than fp16 holds."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, 160, 1, 16) for _ in range(4))
    q, k, do = q.exp() * 0.3 * size, k.exp() * 0.3 * size, do * (64 if size < 1 else 1e-3)
    g, found = -torch.rand(1, 160, 1) * 0.05, []
    with small(64):
        for backend, dtype in (("triton", torch.float16), ("torch", torch.float64)):
            leaves = [x.half().to(dtype).requires_grad_() for x in (q, k, v)]
            o = hsp.linear_attention(*leaves, log_decay=g, normalize=True, backend=backend)
            found.append(torch.autograd.grad(o, leaves, do.half().to(dtype)))
    assert_close("dv", found[0][2].double(), found[1][2], 6.5e-4)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_wide_dims_are_taken_in_pieces(decay: str) -> None:
    """fp32 at most 64 rows and columns of a state at a time, and one column beside a multiple of 16 alone."""
    make = torch.Generator().manual_seed(0)
    width = {"scalar": (), "vector": (70,)}[decay]
    shapes = {"q": (1, 20, 1, 70), "k": (1, 20, 1, 70), "v": (1, 20, 1, 81), "log_decay": (1, 20, 1, *width)}
    x = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    x["log_decay"] = -0.3 * x["log_decay"].abs()
    do = torch.randn(1, 20, 1, 81, generator=make)
    got, want = [], []
    with small(16):
        for backend, dtype, results in (("triton", torch.float32, got), ("torch", torch.float64, want)):
            given = {name: value.to(dtype).requires_grad_() for name, value in x.items()}
            o = hsp.linear_attention(**given, backend=backend)
            assert isinstance(o, Tensor)
            results += [o, *torch.autograd.grad(o, list(given.values()), do.to(dtype))]
    for name, a, b in zip(("o", *(f"d{name}" for name in x)), got, want, strict=True):
        assert_close(name, a.double(), b, 2e-6)


@pytest.mark.parametrize("decay", ["scalar", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_what_cancels_in_a_normaliser_is_multiplied_exactly(dtype: torch.dtype, decay: str) -> None:
    """Values that are nearly the same: of what they give to q, and q and k to g, the denominator takes most back."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 40, 1, 16, generator=make) for _ in range(3))
    g, do = -0.3 * torch.rand(1, 40, 1, generator=make), torch.randn(1, 40, 1, 16, generator=make).to(dtype)
    given = [q.to(dtype), k.to(dtype), (v + 2).to(dtype), *([g] if decay == "scalar" else [])]
    got, want = [], []
    with small(16):
        for backend, results in (("triton", got), ("torch", want)):
            x = [y.to(torch.float64 if backend == "torch" else y.dtype).requires_grad_() for y in given]
            o = hsp.linear_attention(*x[:3], log_decay=(*x, None)[3], normalize=True, backend=backend)
            assert isinstance(o, Tensor)
            results += torch.autograd.grad(o, x, do.to(o.dtype))
    bounds = {"dq": 0.023, "dk": 0.014, "dv": 0.004, "dg": 0.045}  # no more than bf16 needs
    for (name, bound), a, b in zip(bounds.items(), got, want, strict=False):
        error = float((a.double() - b).norm() / b.norm())
        assert error <= bound, f"{name}: {error:.2g}"


def test_rows_beside_a_normaliser_are_multiples_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton copies 16 bytes at a time only then; and the summary gives the column of the normaliser too."""
    from hybrid_sp.kernels.gpu import linear

    seen, scan = [], linear.scan

    def record(x: Tensor, y: Tensor | None, z: Tensor | None, *rest: Any, **options: Any) -> Tensor:
        arrays = (x, y, z, options["out"], options.get("add"))
        seen.extend(array.stride(dim) for array in arrays if array is not None for dim in range(3))
        return scan(x, y, z, *rest, **options)

    monkeypatch.setattr(linear, "scan", record)
    q, k, v = (torch.rand(1, 40, 2, 16).requires_grad_() for _ in range(3))
    with small(16):
        o = hsp.linear_attention(q, k, v, normalize=True, backend="triton")
        want = hsp.linear_attention(q, k, v, normalize=True, backend="torch")
        assert isinstance(o, Tensor) and isinstance(want, Tensor)
        o.sum().backward()
    assert seen and not any(stride % 16 for stride in seen)
    assert_close("o", o.double(), want.double(), 2e-6)


def test_an_int_as_scale_is_a_float_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An int is compiled in if it is 1, and otherwise compiles every kernel once more."""
    from hybrid_sp.kernels.gpu import chunk_scan, state_passing

    kinds: list[list[type]] = []
    for module in (chunk_scan, state_passing):
        launch = module.launch

        def record(kernel: Any, grid: tuple[int, ...], *args: Any, real: Any = launch, **options: Any) -> None:
            kinds[-1] += [type(x) for x in args]
            real(kernel, grid, *args, **options)

        monkeypatch.setattr(module, "launch", record)
    q, k, v = (torch.rand(1, 20, 1, 16).requires_grad_() for _ in range(3))
    for scale in (1, 0.5):
        kinds.append([])
        with small(16):
            hsp.linear_attention(q, k, v, scale=scale, backend="triton").sum().backward()  # type: ignore[union-attr]
    assert kinds[0] == kinds[1]


def test_sums_of_decays_are_exact_within_a_chunk() -> None:
    """Between tokens that follow a strong decay little is forgotten, and the digits of that are not lost."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 32, 1, 16) for _ in range(3))
    g = -torch.rand(1, 32, 1) * 1e-3
    g[:, 2] = -100.0
    with small(32):
        o = hsp.linear_attention(q, k, v, log_decay=g, backend="triton")
    want = hsp.linear_attention(*(x.double() for x in (q, k, v)), log_decay=g.double(), backend="torch")
    assert isinstance(o, Tensor) and isinstance(want, Tensor)
    assert_close("o", o.double(), want, 5e-7)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_a_decay_that_is_not_a_number_is_not_hidden(decay: str) -> None:
    """It reaches every later token of its sequence, and every gradient. (aot.py looks for what a device would hide.)"""
    x = [torch.rand(1, 40, 1, 16).requires_grad_() for _ in range(3)]
    g = -torch.rand(1, 40, 1, *((16,) if decay == "vector" else ()))
    g[:, 20] = float("nan")
    with small(16):
        o = hsp.linear_attention(*x, log_decay=g.requires_grad_(), backend="triton")
        assert isinstance(o, Tensor)
        gradients = torch.autograd.grad(o.sum(), [*x, g])
    assert o[:, :16].isfinite().all() and o[:, 20:].isnan().all()
    assert all(gradient.isnan().any() for gradient in gradients)


RAW = """
import torch
import hybrid_sp as hsp
from tests.support.interpreter import patch_once

patch_once()  # what keeps it from running at all, and no more
x = torch.rand(1, 20, 1, 16)
hsp.linear_attention(x, x, x, log_decay=-x[..., 0], backend="triton")
for dtype, g in ((torch.bfloat16, None), (torch.float32, -x)):
    try:
        hsp.linear_attention(*[x.to(dtype)] * 3, log_decay=g, backend="triton")
    except RuntimeError as error:
        print(error)
"""


def test_an_interpreter_that_is_not_mended_is_refused() -> None:
    """Where it would multiply bf16 numbers: it takes them for integers, and what comes out is not a number."""
    run = subprocess.run([sys.executable, "-c", RAW], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("interpreter multiplies bf16 numbers as integers") == 2
