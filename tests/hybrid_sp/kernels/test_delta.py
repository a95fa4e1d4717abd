"""The delta rule on one device against the token loop: lengths, strong decays, awkward keys, fp32, chunk sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp.kernels.phases import Inputs, Options
from hybrid_sp.kernels.pieces import Spans
from hybrid_sp.kernels.reference import chunks
from hybrid_sp.kernels.reference.delta import DeltaPhases
from tests.support.oracle import assert_close, delta_rule_loop, relative

KINDS = ("none", "scalar", "vector")


def inputs(
    kind: str,
    length: int,
    strong: str = "",
    batch: int = 1,
    groups: int = 2,
    heads: int = 2,
    key: int = 8,
    seed: int = 5,
    states: bool = True,
) -> dict[str, Tensor]:
    """Keys of length 1, beta from 0 to 2: half of the transitions have a negative eigenvalue."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    x = {"q": normal(batch, length, groups, key), "k": F.normalize(normal(batch, length, groups, key), dim=-1)}
    x["v"] = normal(batch, length, heads, key - 1)
    x["beta"] = 2 * torch.rand(batch, length, heads, generator=make, dtype=torch.float64)
    g = -torch.rand(batch, length, heads, key, generator=make, dtype=torch.float64)
    if strong == "spikes":  # a token that wipes the state, between others that keep it
        g[:, 5::17] = -1e4
    elif strong == "everywhere":
        g = g * 300
    elif strong == "channels":  # some channels forget at once, others never
        g[..., ::2] *= 2000
        g[..., 1::2] *= 1e-3
    if kind != "none":
        x["log_decay"] = g if kind == "vector" else g[..., 1 if strong == "channels" else 0]
    if states:
        x["initial_state"] = normal(batch, heads, key, key - 1)
    return x


def outputs(call: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """o, the final state, and the gradient of every input."""
    x = {name: value.detach().requires_grad_() for name, value in x.items()}
    o, final = delta_rule_loop(**x) if call == "loop" else hsp.delta_rule(**x, return_final_state=True)
    make = torch.Generator().manual_seed(9)
    given = [torch.randn(y.shape, generator=make, dtype=torch.float64).to(y) for y in (o, final)]
    grads = torch.autograd.grad([o, final], list(x.values()), given)
    return {"o": o, "final": final} | {f"d{name}": grad for name, grad in zip(x, grads, strict=True)}


def check(where: str, x: dict[str, Tensor], bound: float) -> None:
    want = outputs("loop", {name: value.double() for name, value in x.items()})
    for name, got in outputs("chunks", x).items():
        assert torch.isfinite(got).all(), f"{where} {name}"
        assert_close(f"{where} {name}", got.double(), want[name], bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_every_length(kind: str, length: int) -> None:
    check(f"{kind} {length}", inputs(kind, length), 1e-12)
    check(f"{kind} {length} shared keys", inputs(kind, length, batch=2, groups=2, heads=6, states=False), 1e-12)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("strong", ["spikes", "everywhere", "channels"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=["fp64", "fp32"])
def test_strong_decays_give_right_gradients(kind: str, strong: str, dtype: torch.dtype, bound: float) -> None:
    x = inputs(kind, 150, strong)
    check(f"{kind} {strong}", {name: value.to(dtype) for name, value in x.items()}, bound)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_are_long_alike_or_zero(kind: str) -> None:
    x = inputs(kind, 150)
    check(f"{kind}, beta |k|^2 up to 2.4", x | {"k": 1.1 * x["k"]}, 1e-10)
    check(f"{kind}, one key for all tokens", x | {"k": x["k"][:, :1].expand_as(x["k"])}, 1e-10)
    check(f"{kind}, nothing written", x | {"beta": torch.zeros_like(x["beta"])}, 1e-12)
    check(f"{kind}, no keys", x | {"k": torch.zeros_like(x["k"])}, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_within_its_promise(kind: str) -> None:
    """rms over four draws, at the size of a model's heads."""
    squares: dict[str, float] = {}
    for seed in range(4):
        x = inputs(kind, 300, key=64, seed=seed, states=False)
        if kind != "none":
            x["log_decay"] *= 0.1
        rounded = {name: value.float() for name, value in x.items()}
        want = outputs("loop", {name: value.double() for name, value in rounded.items()})
        for name, got in outputs("chunks", rounded).items():
            squares[name] = squares.get(name, 0.0) + relative(got, want[name]) ** 2 / 4
    assert {name: square**0.5 for name, square in squares.items() if not square**0.5 <= 5e-6} == {}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_chunks_do_not_change_the_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(kind, 700)
    want = outputs("chunks", x)
    for chunk, rows in ((64, 128), (32, 1024), (128, 100000)):
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        monkeypatch.setattr(chunks, "BLOCK_ROWS", rows)
        for name, got in outputs("chunks", x).items():
            assert_close(f"{kind} chunk {chunk} rows {rows} {name}", got, want[name], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_carries_on_where_the_last_call_ended(kind: str) -> None:
    x = inputs(kind, 100)
    o, final = hsp.delta_rule(**x, return_final_state=True)
    S, parts = x.pop("initial_state"), []
    for start, end in ((0, 70), (70, 71), (71, 100)):
        here = {name: value[:, start:end] for name, value in x.items()}
        part, S = hsp.delta_rule(**here, initial_state=S, return_final_state=True)
        parts.append(part)
    assert_close("o", torch.cat(parts, 1), o, 1e-12)
    assert_close("final", S, final, 1e-12)


@pytest.mark.parametrize("lone", ["o", "final"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_on_one_output_and_the_gradient_of_one_input(kind: str, lone: str) -> None:
    x = inputs(kind, 90)
    for name in x:
        if lone == "final" and name == "q":
            continue  # the final state does not depend on it
        grads = []
        for call in (hsp.delta_rule, delta_rule_loop):
            leaves = x | {name: x[name].detach().requires_grad_()}
            options: dict[str, Any] = {"return_final_state": True} if call is hsp.delta_rule else {}
            o, final = call(**leaves, **options)
            grads += torch.autograd.grad((o if lone == "o" else final).sum(), leaves[name])
        assert_close(f"{kind} d{name} of {lone}", grads[0], grads[1], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_graph_gives_the_same_gradients_again(kind: str) -> None:
    x = {name: value.requires_grad_() for name, value in inputs(kind, 90).items()}
    loss = hsp.delta_rule(**x).square().sum()
    first = torch.autograd.grad(loss, list(x.values()), retain_graph=True)
    for name, a, b in zip(x, first, torch.autograd.grad(loss, list(x.values())), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_span_does_is_the_product_of_its_tokens(kind: str) -> None:
    """Transitions and states of two spans, in the second of which documents begin, from (I - beta k k^T) diag(a)."""
    lengths, documents = (70, 30), (80, 85)
    x = inputs(kind, sum(lengths), batch=1, groups=1)
    k, v, beta, g = x["k"].repeat_interleave(2, 2), x["v"], x["beta"], x.get("log_decay")
    options = Options(1.0, True, torch.float64)
    phases, given = DeltaPhases.prepare(Inputs(x["q"], x["k"], v, g, beta), Spans(lengths, documents), options)
    summary, _ = phases.states_forward(given)
    token = 0
    for span, length in enumerate(lengths):
        A, S = torch.eye(8, dtype=torch.float64).repeat(1, 2, 1, 1), v.new_zeros(1, 2, 8, 7)
        for t in range(token, token + length):
            if t in documents:
                A, S = torch.zeros_like(A), torch.zeros_like(S)
            decay = v.new_ones(1, 2, 8) if g is None else (g if kind == "vector" else g[..., None])[:, t].exp()
            step = torch.eye(8) - beta[:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None]
            step = step * decay.expand(1, 2, 8)[:, :, None]
            A = step @ A
            S = step @ S + beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        token += length
        assert summary is not None and summary.transition is not None
        assert_close(f"transition of span {span}", summary.transition[span], A, 1e-12)
        assert_close(f"state that leaves span {span}", summary.state[span], S, 1e-12)


X = {name: value.float() for name, value in inputs("vector", 6, batch=2, heads=4).items()}


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("q and k must have one shape", {"k": X["k"][..., 1:]}),
        ("must have the batch and tokens of q", {"v": X["v"][:, 1:]}),
        ("v has 3 heads, not a multiple of the 2 key heads", {"v": X["v"][:, :, 1:]}),
        ("must share a dtype", {"v": X["v"].double()}),
        ("must be floating point", {"q": X["q"].int(), "k": X["k"].int(), "v": X["v"].int()}),
        (r"must be \[batch, tokens, heads, dim\]", {"q": X["q"][0], "k": X["k"][0]}),
        (r"beta must be \(2, 6, 4\)", {"beta": X["beta"][..., None]}),
        (r"beta must be \(2, 6, 4\)", {"beta": X["beta"][:, :, :2]}),
        ("beta must be floating point", {"beta": X["beta"].int()}),
        ("log_decay must be one of", {"log_decay": X["log_decay"][0, 0, :, 0]}),
        ("log_decay must be one of", {"log_decay": X["log_decay"][:, :, :2]}),
        ("initial_state must have the shape", {"initial_state": X["initial_state"].mT}),
        ("initial_state must be torch.float32", {"initial_state": X["initial_state"].double()}),
        ("backend must be", {"backend": "cuda"}),
        ("holds 7 of 7", {"shard": hsp.SequenceParallel(None).shard(7)}),
        ("batch", {"shard": hsp.SequenceParallel(None).shard(6, (0, 2, 6))}),
    ],
)
def test_delta_rule_refuses(message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"delta_rule: .*{message}"):
        hsp.delta_rule(**X | changed)
