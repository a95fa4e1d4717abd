"""The change of variables under a decay per key channel, on Triton's interpreter, against sums over pairs in fp64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from hybrid_sp.kernels.phases import Inputs, Options
from hybrid_sp.kernels.pieces import Spans
from hybrid_sp.kernels.reference import chunks
from hybrid_sp.kernels.reference.decays import chunk_decays
from hybrid_sp.kernels.reference.linear import LinearPhases
from tests.support.interpreter import mend
from tests.support.oracle import assert_close
from tests.support.tiers import tiered

pytest.importorskip("triton")
from hybrid_sp.kernels.gpu.segments import Segments, segment  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

if os.environ.get("TRITON_INTERPRET") == "1":
    from hybrid_sp.kernels.gpu import vector_decay

    mend()

BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
CPU = torch.device("cpu")
SCALE = 0.3


class Case:
    """Inputs of all four functions in a dtype, chunks of tokens, and what the functions must give."""

    def __init__(
        self,
        width: int,
        segments: Segments,
        dtype: torch.dtype = torch.float32,
        heads: int = 2,
        shared: int = 1,
        batch: int = 1,
        bonus: bool = False,
        decays: str = "mixed",
        strided: bool = False,
        size: float = 1.0,
    ) -> None:
        self.segments = segments
        make = torch.Generator().manual_seed(7)
        T, groups = int(segments.table[:, 1].max()), heads // shared

        def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            if not strided:
                return torch.randn(shape, generator=make).to(dtype)
            wide = torch.randn(*shape[:-2], shape[-1] + 3, shape[-2], generator=make).to(dtype).mT
            return wide[..., 1 : 1 + shape[-1]] if len(shape) % 2 else wide.mT.contiguous().mT[..., : shape[-1]]

        self.q, self.k = (random(batch, T, groups, width, dtype=dtype) for _ in range(2))
        self.v, self.do = (random(batch, T, heads, 11, dtype=dtype) for _ in range(2))
        self.do = self.do * size
        self.g = -random(batch, T, heads, width).abs()
        if decays == "mixed":  # channels that keep, forget slowly and forget at once
            self.g *= torch.tensor([1e-3, 0.1, 1.0, 30.0]).repeat(width)[:width]
        elif decays == "spikes":  # a token that wipes the state, between others that keep it
            self.g *= 0.05
            self.g[:, 5::7] = -1e4
            self.g[:, 9::11] = 0.0
        elif decays == "none":
            self.g *= 0.0
        self.u = torch.randn(heads, width, generator=make) if bonus else None
        self.d_since, self.d_until, self.dk_A, self.dg_A = (random(batch, T, heads, width) * size for _ in range(4))
        self.d_totals = random(len(segments.chunks), batch, heads, width)

    def chunks(self) -> list[tuple[int, int]]:
        C = self.segments.chunk
        rows = self.segments.table.tolist()
        return [(t, min(t + C, stop)) for start, stop, *_ in rows for t in range(start, stop, C)]

    def want(self) -> dict[str, Tensor]:
        """All results, from sums of g over every pair of a chunk, and autograd."""
        C, heads = self.segments.chunk, self.g.shape[2]
        repeats = heads // self.k.shape[2]
        q, k = (x.double().repeat_interleave(repeats, 2).requires_grad_() for x in (self.q, self.k))
        g = self.g.double().requires_grad_()
        u = None if self.u is None else self.u.double().requires_grad_()
        until, since, totals = torch.zeros_like(q), torch.zeros_like(q), []
        A = q.new_zeros(*q.shape[:3], C)
        by_A = q.new_zeros(())
        for a, b in self.chunks():
            t = torch.arange(b - a)
            to = t - 1 if self.u is not None else t  # the last decay that token t reads
            g_c, q_c, k_c = (x[:, a:b].transpose(1, 2) for x in (g, q, k))
            within = (t[None, None] > t[None, :, None]) & (t[None, None] <= to[:, None, None])  # [t, s, j]
            sums = torch.einsum("tsj,bhjk->bhtsk", within.double(), g_c)
            weights = torch.einsum("bhtk,bhtsk,bhsk->bhts", q_c, sums.exp(), k_c)
            weights = weights * (to[:, None] >= t)
            if u is not None:
                weights = weights + torch.diag_embed((u[:, None] * q_c * k_c).sum(-1))
            since[:, a:b] = (((t <= to[:, None]).double() @ g_c).exp() * q_c).transpose(1, 2)
            until[:, a:b] = (((t > t[:, None]).double() @ g_c).exp() * k_c).transpose(1, 2)
            totals.append(g_c.sum(2))
            A[:, a:b, :, : b - a] = weights.transpose(1, 2)
            do, v = self.do[:, a:b].double(), self.v[:, a:b].double()
            by_A = by_A + SCALE * torch.einsum("bthv,bhts,bshv->", do, weights, v)
        given = by_A + (since * self.d_since.double()).sum()
        leaves = [q, k, g, *([] if u is None else [u])]
        dq, dk_A, dg_A, *du = torch.autograd.grad(given, leaves, retain_graph=True)
        given = (until * self.d_until.double()).sum() + (torch.stack(totals) * self.d_totals.double()).sum()
        dk, dg = torch.autograd.grad(given, [k, g])
        out = {"until": until, "totals": torch.stack(totals), "since": since, "A": A, "dq": dq, "dk_A": dk_A}
        out |= {"dg_A": dg_A, "dk": dk + self.dk_A.double(), "dg": dg + self.dg_A.double()}
        return {name: x.detach() for name, x in (out | ({"du": du[0]} if du else {})).items()}

    def forward(self) -> dict[str, Tensor]:
        until, totals = vector_decay.keys_forward(self.k, self.g, self.segments)
        since, A = vector_decay.queries_forward(self.q, self.k, self.g, self.u, self.segments)
        return {"until": until, "totals": totals, "since": since, "A": A}

    def read(self) -> dict[str, Tensor]:
        got = vector_decay.queries_backward(
            self.d_since, self.do, self.q, self.k, self.v, self.g, self.u, SCALE, self.segments
        )
        return {name: x for name, x in zip(("dq", "dk_A", "dg_A", "du"), got, strict=True) if x is not None}

    def wrote(self) -> dict[str, Tensor]:
        given = self.dk_A.contiguous().clone(), self.dg_A.contiguous().clone()
        dk, dg = vector_decay.keys_backward(self.d_until, self.d_totals, *given, self.k, self.g, self.segments)
        return {"dk": dk, "dg": dg}

    def check(self, bound: float) -> None:
        got, want = self.forward() | self.read() | self.wrote(), self.want()
        assert got.keys() == want.keys()
        for name, x in got.items():
            dtype = self.k.dtype if name in ("until", "since", "A") else torch.float32
            assert x.dtype == dtype, name
            assert torch.isfinite(x).all(), name
            assert_close(name, x, want[name], bound)


FP32, FP16, BF16 = BOUNDS
WIDTHS = [
    (5, 16, 19, FP32, False),
    (5, 16, 19, FP16, True),
    (16, 64, 75, FP32, True),
    (16, 64, 75, BF16, False),
    (64, 16, 21, FP32, False),
    (64, 16, 21, BF16, True),
    (153, 16, 16, FP32, True),
    (153, 32, 33, FP16, False),
]


@pytest.mark.parametrize(("width", "chunk", "length", "dtype", "bonus"), tiered(WIDTHS[:-2], WIDTHS[-2:]), ids=str)
def test_all_widths_and_dtypes(width: int, chunk: int, length: int, dtype: torch.dtype, bonus: bool) -> None:
    Case(width, segment(Spans((length,)), 1, chunk, CPU), dtype, heads=1, bonus=bonus).check(BOUNDS[dtype])


@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
@pytest.mark.parametrize("decays", ["none", "small", "spikes"])
def test_strong_decays_cost_the_others_nothing(decays: str, bonus: bool) -> None:
    Case(8, segment(Spans((33,)), 1, 32, CPU), heads=1, decays=decays, bonus=bonus).check(BOUNDS[torch.float32])


@pytest.mark.parametrize(("batch", "heads", "bonus"), tiered([(1, 4, True)], [(2, 2, False)]))
def test_spans_documents_heads_and_strides(batch: int, heads: int, bonus: bool) -> None:
    segments = segment(Spans((7, 1, 21), (0, 3, 13)), 4, 16, CPU)
    assert segments.pieces.count == 5
    case = Case(12, segments, heads=heads, shared=2, batch=batch, bonus=bonus, strided=True)
    assert not case.q.is_contiguous() and not case.g.is_contiguous()
    case.check(BOUNDS[torch.float32])


def test_large_gradients_fit_into_fp16() -> None:
    segments = segment(Spans((16,)), 1, 16, CPU)
    case = Case(16, segments, torch.float16, heads=1, decays="small", size=1e4)
    case.v = case.v * 100  # dA is far above 65504, dq is not what must fit
    case.check(BOUNDS[torch.float16])


@pytest.mark.parametrize("bonus", tiered([False], [True]), ids=["plain", "bonus"])
def test_the_same_as_the_torch_kernels(bonus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With these variables and a state from chunk to chunk, o and all gradients of `kernels/reference/linear.py`."""
    monkeypatch.setattr(chunks, "CHUNK", 128)  # narrow keys and values take half of it
    lengths, documents = (80, 20), (70,)
    case = Case(12, segment(Spans(lengths, documents), 2, 64, CPU), shared=2, bonus=bonus)
    q, k, v, g, do = (x.double() for x in (case.q, case.k, case.v, case.g, case.do))
    u = None if case.u is None else case.u.double()
    phases, x = LinearPhases.prepare(
        Inputs(q, k, v, g, None, u), Spans(lengths, documents), Options(SCALE, False, torch.float64)
    )
    _, work = phases.states_forward(x)
    o, work = phases.intra_forward(x, work)
    o, saved = phases.inter_forward(x, work, o, None)
    _, read = phases.inter_backward(do, x, saved, None)
    dq, du, local = phases.intra_backward(read)
    _, dk, _, dg, _ = phases.states_backward(local, None)
    assert dg is not None

    got = {name: x.double() for name, x in case.forward().items()}
    where = case.chunks()
    pieces = phases.chunks.pieces
    assert len(where) == pieces.count
    o_got, d_since, d_until = torch.zeros_like(o), torch.zeros_like(g), torch.zeros_like(g)
    S = v.new_zeros(pieces.count, *g.shape[::2], g.shape[3], v.shape[3])
    for n, (a, b) in enumerate(where):
        o_got[:, a:b] = SCALE * torch.einsum("bths,bshv->bthv", got["A"][:, a:b, :, : b - a], v[:, a:b])
        o_got[:, a:b] += SCALE * torch.einsum("bthk,bhkv->bthv", got["since"][:, a:b], S[n])
        d_since[:, a:b] = SCALE * torch.einsum("bthv,bhkv->bthk", do[:, a:b], S[n])
        if n + 1 < len(where) and not pieces.all[n + 1].fresh:
            added = torch.einsum("bthk,bthv->bhkv", got["until"][:, a:b], v[:, a:b])
            S[n + 1] = got["totals"][n].exp().unsqueeze(-1) * S[n] + added
    dS = torch.zeros_like(S[0])  # of the state that leaves chunk n
    for n, (a, b) in reversed(list(enumerate(where))):
        d_until[:, a:b] = torch.einsum("bthv,bhkv->bthk", v[:, a:b], dS)
        case.d_totals[n] = (got["totals"][n].exp().unsqueeze(-1) * S[n] * dS).sum(-1)
        dS = got["totals"][n].exp().unsqueeze(-1) * dS
        dS += SCALE * torch.einsum("bthk,bthv->bhkv", got["since"][:, a:b], do[:, a:b])
        if pieces.all[n].fresh:
            dS = torch.zeros_like(dS)
    case.d_since, case.d_until = d_since.float(), d_until.float()
    got = case.read()
    case.dk_A, case.dg_A = got["dk_A"], got["dg_A"]
    got |= case.wrote()
    assert_close("o", o_got, o, 1e-6)
    assert_close("dq", got["dq"].sum(2, keepdim=True), dq, 1e-6)
    assert_close("dk", got["dk"].sum(2, keepdim=True), dk, 1e-6)
    assert_close("dg", got["dg"], dg, 1e-6)
    assert_close("d_bonus", got.get("du"), du, 1e-6)


def test_scores_of_one_chunk_are_those_of_the_reference() -> None:
    case = Case(8, segment(Spans((32,)), 1, 32, CPU), heads=1, decays="spikes")
    q, k, g = (x[0].transpose(0, 1).double() for x in (case.q, case.k, case.g))
    assert_close("A", case.forward()["A"][0].transpose(0, 1), chunk_decays(g).scores(q, k), 1e-6)
