"""Every mixer: its formula, decoding, causality, dtypes and cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hybrid_sp as hsp
from layers.recurrence import RecurrentMixer
from layers.registry import MIXERS, mixer_spec
from tests.layers.cases import CASES, PLACE, Case, tokens
from tests.support.oracle import assert_close, relative

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_no_mixer_is_left_out() -> None:
    assert {case.mixer for case in CASES} == set(MIXERS)


@every_case
def test_output_and_gradients_are_those_of_the_formula(case: Case) -> None:
    mixer = case.build()
    x, x_formula = tokens(37).requires_grad_(), tokens(37).requires_grad_()
    y, cache = mixer(x)
    assert cache is None
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in mixer.named_parameters()}
    y_formula = case.formula(weights, x_formula, **case.options)
    assert_close("y", y, y_formula, 1e-10)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    (y * dy).sum().backward()
    (y_formula * dy).sum().backward()
    assert_close("dx", x.grad, x_formula.grad, 1e-10)
    for name, weight in mixer.named_parameters():
        assert_close(f"d {name}", weight.grad, weights[name].grad, 1e-10)


def test_forms_say_how_the_state_decays() -> None:
    dims = {"none": None, "fixed": 1, "scalar": 3, "vector": 4}
    for case in CASES:
        mixer = case.build()
        if isinstance(mixer, RecurrentMixer):
            q, k, *_ = mixer.project(tokens(5))
            log_decay = mixer.rule(tokens(5), q, k, torch.arange(5))[2]
            assert (None if log_decay is None else log_decay.ndim) == dims[mixer.form.decay], case


@every_case
def test_decoding_is_the_parallel_forward(case: Case) -> None:
    mixer = case.build()
    x = tokens(20)
    want, _ = mixer(x)
    cache = mixer.init_cache(2)
    for t in range(20):
        got, cache = mixer(x[:, t : t + 1], cache=cache)
        assert_close(f"token {t}", got[:, 0], want[:, t], 1e-10)
    assert cache.position == 20


@every_case
def test_a_token_changes_nothing_before_it_and_everything_after(case: Case) -> None:
    mixer = case.build()
    x = tokens(70)
    y, _ = mixer(x)
    for t in (1, 33, 69):
        changed = x.clone()
        changed[0, t] += 1
        y_changed, _ = mixer(changed)
        assert torch.equal(y_changed[:, :t], y[:, :t]), f"token {t} leaks into the past"
        assert torch.equal(y_changed[1], y[1]), f"token {t} leaks into another sequence"
        assert (y_changed[0, t:] != y[0, t:]).any(dim=-1).all(), f"token {t} is not seen by all that follow"


@every_case
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_dtypes(case: Case, dtype: torch.dtype, bound: float) -> None:
    mixer = case.build(dtype)
    y, _ = mixer(tokens(40, dtype))
    assert y.dtype == dtype
    assert relative(y, case.build()(tokens(40))[0]) < bound
    cache = mixer.init_cache(2)
    state_dtype = dtype if case.mixer == "softmax" else torch.float32
    for t in range(3):
        step, cache = mixer(tokens(40, dtype)[:, t : t + 1], cache=cache)
        assert step.dtype == dtype
        assert {tensor.dtype for tensor in cache.tensors} == {state_dtype}
        assert relative(step[:, 0], y[:, t]) < bound


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cost_is_what_is_counted(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length = 3, 7
    mixer = case.build(dtype)
    cost = mixer_spec(case.mixer, **case.options).cost(PLACE)
    assert cost.parameters == sum(weight.numel() for weight in mixer.parameters())

    cache = mixer.init_cache(batch)
    x = tokens(length, dtype, batch)
    for t in range(length):
        _, cache = mixer(x[:, t : t + 1], cache=cache)
    assert cost.state_bytes(batch, length, dtype) == sum(tensor.nbytes for tensor in cache.tensors)

    monkeypatch.setattr(hsp, "linear_attention", countable_linear_attention)
    monkeypatch.setattr(hsp, "softmax_attention", countable_softmax_attention)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(x)
    assert cost.flops_per_token(length) * batch * length == counter.get_total_flops()


def countable_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, log_decay, normalize, shard) -> Tensor:  # type: ignore[no-untyped-def]
    """The recurrence with its sizes alone, each product a batched matrix product, which the counter knows."""
    outputs = []
    S = q.new_zeros(q[:, 0].numel() // q.shape[-1], q.shape[-1], v.shape[-1])
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        S = torch.baddbmm(S, k_t.flatten(0, 1)[:, :, None], v_t.flatten(0, 1)[:, None, :])
        outputs.append(torch.bmm(q_t.flatten(0, 1)[:, None, :], S).view_as(v_t))
        if normalize:
            torch.bmm(q_t.flatten(0, 1)[:, None, :], k_t.flatten(0, 1)[:, :, None])
    return torch.stack(outputs, dim=1)


def countable_softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, shard, causal) -> Tensor:  # type: ignore[no-untyped-def]
    """Each query against the keys up to it, each product a batched matrix product, which the counter knows."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    outputs = []
    for t in range(q.shape[1]):
        outputs.append(torch.bmm(torch.bmm(q[:, t : t + 1], k[:, : t + 1].mT).softmax(-1), v[:, : t + 1]))
    return torch.cat(outputs, dim=1).unflatten(0, (-1, PLACE.heads)).transpose(1, 2)
