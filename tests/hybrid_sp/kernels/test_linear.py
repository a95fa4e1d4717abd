"""The chunkwise kernel where it is hard: strong decays, many chunks, long sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.kernels.pieces import Spans
from hybrid_sp.kernels.reference import chunks
from tests.support.oracle import assert_close, linear_attention_loop

KINDS = ("none", "scalar", "vector")


def inputs(kind: str, length: int, strong: str = "") -> list[Tensor]:
    make = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, length, 2, 8, generator=make, dtype=torch.float64) for _ in range(3))
    if kind == "none":
        return [q, k, v]
    g = -torch.rand(1, length, 2, 8, generator=make, dtype=torch.float64)
    if strong == "spikes":  # a token that wipes the state, between others that keep it
        g[:, 5::17] = -1e4
    elif strong == "everywhere":
        g = g * 300
    elif strong == "channels":  # some channels forget at once, others never
        g[..., ::2] *= 2000
        g[..., 1::2] *= 1e-3
    return [q, k, v, g if kind == "vector" else g[..., 1 if strong == "channels" else 0]]


def outputs(call: str, x: list[Tensor]) -> list[Tensor]:
    x = [y.detach().requires_grad_() for y in x]
    decay = x[3] if len(x) == 4 else None
    if call == "loop":
        o, final = linear_attention_loop(*x[:3], decay)
    else:
        o, final = hsp.linear_attention(*x[:3], log_decay=decay, return_final_state=True)
    assert isinstance(final, Tensor)
    return [o, final, *torch.autograd.grad(o.square().sum() + final.sum(), x)]


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("strong", ["spikes", "everywhere", "channels"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=["fp64", "fp32"])
def test_strong_decays_give_right_gradients(kind: str, strong: str, dtype: torch.dtype, bound: float) -> None:
    x = [y.to(dtype) for y in inputs(kind, 150, strong)]
    names = ("o", "final", "dq", "dk", "dv", "dg")
    for name, got, want in zip(names, outputs("chunks", x), outputs("loop", [y.double() for y in x]), strict=True):
        assert torch.isfinite(got).all(), name
        assert_close(f"{kind} {strong} {name}", got.double(), want, bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_every_length(kind: str, length: int) -> None:
    x = inputs(kind, length)
    for got, want in zip(outputs("chunks", x), outputs("loop", x), strict=True):
        assert_close(f"{kind} {length}", got, want, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_chunks_do_not_change_the_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(kind, 700)
    want = outputs("chunks", x)
    for chunk, rows in ((64, 128), (32, 1024), (128, 100000)):
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        monkeypatch.setattr(chunks, "BLOCK_ROWS", rows)
        for got, expected in zip(outputs("chunks", x), want, strict=True):
            assert_close(f"{kind} chunk {chunk} rows {rows}", got, expected, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_each_input_alone_has_its_gradient_from_the_state_alone(kind: str) -> None:
    for i in range(1, len(inputs(kind, 150))):  # q does not reach the state
        grads = []
        for loop in (False, True):
            x = inputs(kind, 150)
            x[i].requires_grad_()
            decay = x[3] if len(x) == 4 else None
            if loop:
                final = linear_attention_loop(*x[:3], decay)[1]
            else:
                final = hsp.linear_attention(*x[:3], log_decay=decay, return_final_state=True)[1]
            assert isinstance(final, Tensor)
            grads.append(torch.autograd.grad(final.square().sum(), x[i])[0])
        assert_close(f"{kind} input {i}", *grads, 1e-10)


def test_cut_covers_every_token_once_and_never_crosses_a_document() -> None:
    for lengths, boundaries in (((1,), ()), ((64, 65), (3, 64, 70, 128)), ((130, 7, 64), (5, 6, 130)), ((1, 1), (1,))):
        length = sum(lengths)
        cut = chunks.chunks_of(Spans(lengths, boundaries), torch.empty(1, length, 4, 64), 64)
        seen, chunk_of = torch.zeros(1, length, 1, 1), torch.full((1, length, 1), -1)
        for block in cut.blocks:
            block.add(seen, torch.ones(block.count, block.chunk, 1))
            numbers = torch.arange(block.first, block.first + block.count)[:, None].expand(-1, block.chunk)
            block.store(chunk_of, numbers)
            rows = block.load(torch.arange(1, length + 1)[None, :, None, None], 1).view(block.count, block.chunk)
            for n, tokens in zip(range(block.first, block.first + block.count), rows.tolist(), strict=True):
                real = [t - 1 for t in tokens if t]
                assert real == list(range(real[0], real[0] + len(real)))
                assert cut.pieces.all[n].fresh == (
                    real[0] in (*boundaries, *(sum(lengths[:i]) for i in range(len(lengths))))
                )
                assert not set(real[1:]) & set(boundaries)
                span_start = sum(lengths[: block.span])
                assert cut.pieces.all[n].reached == (not any(span_start <= t <= real[0] for t in boundaries))
        assert (seen == 1).all()
        assert chunk_of.unique().tolist() == list(range(cut.pieces.count))
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        assert cut.pieces.open == tuple(
            not any(e - n <= t < e for t in boundaries) for e, n in zip(ends, lengths, strict=True)
        )
