"""Every mixer: its formula, decoding, causality, dtypes and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hybrid_sp as hsp
from layers.recurrence import RecurrentMixer, RecurrentSpec
from layers.registry import MIXERS, mixer_cost, mixer_spec
from tests.layers.cases import CASES, CONTEXT, Case, tokens
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
    y_formula = case.formula(weights, x_formula, **case.told)
    assert_close("y", y, y_formula, 1e-10)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    (y * dy).sum().backward()
    (y_formula * dy).sum().backward()
    assert_close("dx", x.grad, x_formula.grad, 1e-10)
    for name, weight in mixer.named_parameters():
        assert_close(f"d {name}", weight.grad, weights[name].grad, 1e-10)


@every_case
def test_a_convolution_reads_as_many_tokens_as_its_option_says(case: Case) -> None:
    taps = dict(case.build().named_parameters()).get("conv.weight")
    assert (0 if taps is None else taps.shape[1]) == getattr(case.spec, "conv", 0)


OF_ITS_OWN = [name for name, spec in MIXERS.items() if issubclass(spec, RecurrentSpec)]


@pytest.mark.parametrize("name", OF_ITS_OWN)
def test_heads_of_its_own_are_those_of_a_model_that_has_as_many(name: str) -> None:
    there = dataclasses.replace(CONTEXT, heads=2, kv_heads=2)
    own = mixer_spec(name, heads=2, head_dim=12).build(CONTEXT).double()
    by_model = mixer_spec(name).build(there).double()
    by_model.load_state_dict(own.state_dict())
    assert torch.equal(own(tokens(9))[0], by_model(tokens(9))[0])
    wide = mixer_spec(name, head_dim=8).build(CONTEXT)
    assert wide.shape.value == mixer_spec(name).build(dataclasses.replace(CONTEXT, dim=32)).shape.value
    assert wide.output.weight.shape == (CONTEXT.dim, 4 * wide.shape.value)


def test_shapes_say_how_the_state_decays() -> None:
    dims = {"none": None, "fixed": 1, "scalar": 3, "vector": 4}
    for case in CASES:
        mixer = case.build()
        if isinstance(mixer, RecurrentMixer):
            q, k, v, *_ = mixer.project(tokens(5))
            inputs = mixer.rule(tokens(5), q, k, v, torch.arange(5))
            log_decay = inputs.log_decay
            assert (None if log_decay is None else log_decay.ndim) == dims[mixer.shape.decay], case
            assert (inputs.beta is not None) == mixer.shape.delta, case


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
def test_the_cache_of_a_linear_mixer_does_not_grow(case: Case) -> None:
    mixer, sizes = case.build(), []
    x = tokens(150)
    _, cache = mixer(x[:, :130], cache=mixer.init_cache(2))  # more than the widest window
    for t in range(130, 150):
        _, cache = mixer(x[:, t : t + 1], cache=cache)
        sizes.append(sum(tensor.nbytes for tensor in cache.tensors))
    grows = sizes[-1] > sizes[0]
    assert grows == (MIXERS[case.mixer].letter == "N")


@every_case
def test_a_token_changes_nothing_before_it_and_all_that_see_it(case: Case) -> None:
    mixer = case.build()
    x = tokens(70)
    y, _ = mixer(x)
    for t in (1, 33, 60, 69):
        changed = x.clone()
        changed[0, t] += 1
        y_changed, _ = mixer(changed)
        assert torch.equal(y_changed[:, :t], y[:, :t]), f"token {t} leaks into the past"
        assert torch.equal(y_changed[1], y[1]), f"token {t} leaks into another sequence"
        end = t + case.options.get("window", case.memory)
        assert (y_changed[0, t:end] != y[0, t:end]).any(dim=-1).all(), f"token {t} is not seen by all that follow"
        if "window" in case.options:
            assert torch.equal(y_changed[0, end:], y[0, end:]), f"token {t} is seen from beyond the window"


@every_case
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_dtypes(case: Case, dtype: torch.dtype, bound: float) -> None:
    mixer = case.build(dtype)
    y, _ = mixer(tokens(40, dtype))
    assert y.dtype == dtype
    assert relative(y, case.build()(tokens(40))[0]) < bound
    cache = mixer.init_cache(2)
    for t in range(3):
        step, cache = mixer(tokens(40, dtype)[:, t : t + 1], cache=cache)
        assert step.dtype == dtype
        assert [tensor.dtype for tensor in cache.tensors] == [tensor.dtype for tensor in mixer.init_cache(2).tensors]
        if isinstance(mixer, RecurrentMixer):
            assert {tensor.dtype for tensor in cache.tensors[bool(mixer.shape.conv) :]} == {torch.float32}
        assert relative(step[:, 0], y[:, t]) < bound


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cost_is_what_is_counted(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length = 3, 7
    mixer = case.build(dtype)
    cost = mixer_cost(case.spec, CONTEXT)
    assert cost.matmul_params == sum(weight.numel() for weight in mixer.parameters() if weight.ndim > 1)
    assert cost.other_params == sum(weight.numel() for weight in mixer.parameters() if weight.ndim == 1)

    cache = mixer.init_cache(batch)
    x = tokens(length, dtype, batch)
    for t in range(length):
        _, cache = mixer(x[:, t : t + 1], cache=cache)
    assert cost.state_bytes(batch, length, dtype) == sum(tensor.nbytes for tensor in cache.tensors)

    monkeypatch.setattr(hsp, "linear_attention", countable_linear_attention)
    monkeypatch.setattr(hsp, "delta_rule", countable_delta_rule)
    monkeypatch.setattr(hsp, "short_conv", countable_short_conv)
    monkeypatch.setattr(hsp, "softmax_attention", countable_softmax_attention)
    monkeypatch.setattr(hsp, "latent_attention", countable_latent_attention)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(x)
    assert cost.flops(length) * batch == counter.get_total_flops()


def countable_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay, bonus, scale, shard, backend, normalize=False
) -> Tensor:  # type: ignore[no-untyped-def]
    """The recurrence with its sizes alone, each product a batched matrix product, which the counter knows."""
    outputs = []
    for q_BH1K, k_BHK1, v_BH1V, S in countable_states(q, k, v):
        torch.baddbmm(S, k_BHK1, v_BH1V)
        outputs.append(torch.bmm(q_BH1K, S))
        if normalize or bonus is not None:  # q z, or r (u k)
            torch.bmm(q_BH1K, k_BHK1)
    return torch.stack(outputs, dim=1).view_as(v)


def countable_delta_rule(q: Tensor, k: Tensor, v: Tensor, *, beta, log_decay, scale, steps, shard, backend) -> Tensor:  # type: ignore[no-untyped-def]
    """The same for the delta rule: what the state has under a key, its replacement, and the read."""
    outputs = []
    for q_BH1K, k_BHK1, v_BH1V, S in countable_states(q, k, v):
        held_BH1V = torch.bmm(k_BHK1.mT, S)
        torch.baddbmm(S, k_BHK1, v_BH1V - held_BH1V)
        outputs.append(torch.bmm(q_BH1K, S))
    return torch.stack(outputs, dim=1).view_as(v)


def countable_states(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each token q as a row, k as a column and v as a row, [B*H, ...], and a state."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    S = q.new_zeros(v[:, 0].numel() // v.shape[-1], q.shape[-1], v.shape[-1])
    for t in range(q.shape[1]):
        q_t, k_t, v_t = (x[:, t].flatten(0, 1) for x in (q, k, v))
        yield q_t[:, None], k_t[:, :, None], v_t[:, None], S


def countable_short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, activation, shard) -> Tensor:  # type: ignore[no-untyped-def]
    """W products in every channel of every token."""
    width = weight.shape[1]
    windows_DXW = F.pad(x, (0, 0, width - 1, 0)).unfold(1, width, 1).flatten(0, 1).transpose(0, 1)
    return torch.bmm(windows_DXW, weight[:, :, None])[..., 0].T.reshape(x.shape)


def countable_softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, shard, window, backend, sinks=None) -> Tensor:  # type: ignore[no-untyped-def]
    """Each query against the keys that it sees, each product a batched matrix product, which the counter knows."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    outputs = []
    for t in range(q.shape[1]):
        seen = slice(max(0, t + 1 - (window or t + 1)), t + 1)
        outputs.append(torch.bmm(torch.bmm(q[:, t : t + 1], k[:, seen].mT).softmax(-1), v[:, seen]))
    return torch.cat(outputs, dim=1).unflatten(0, (-1, CONTEXT.heads)).transpose(1, 2)


def countable_latent_attention(q, latent, rope_k, w_k, w_v, *, shard, causal, backend):  # type: ignore[no-untyped-def]
    """Keys and values from two matrix products, then as softmax attention."""
    k, v = ((latent @ w.flatten(0, 1).T).unflatten(-1, w.shape[:2]) for w in (w_k, w_v))
    k = torch.cat([k, rope_k.unsqueeze(2).expand(*k.shape[:3], -1)], -1)
    return countable_softmax_attention(q, k, v, shard=shard, window=None, backend=backend)


@pytest.mark.parametrize("lower_bound", ["learned", "fixed", "none"])
@pytest.mark.parametrize("layer", [0, 3])
def test_forget_gates_of_hgrn2_at_their_ends(lower_bound: str, layer: int) -> None:
    """In fp32 and at any logit the log of the gate is its own in fp64, and no gradient is lost in an infinity."""
    context = dataclasses.replace(CONTEXT, layer=layer)
    rule = mixer_spec("hgrn2", lower_bound=lower_bound).build(context).rule
    bound = 0.0 if lower_bound == "none" else layer / 4
    logits = torch.tensor([-1e4, -200.0, -30.0, -3.0, 0.0, 3.0, 30.0, 200.0, 1e4])
    x = logits[:, None, None, None].expand(9, 1, 4, 6).clone().requires_grad_()
    inputs = rule(x, x, x, x, torch.arange(1))
    log_f, write = inputs.log_decay[:, 0, 0, 0], inputs.k[:, 0, 0, 0]
    wide = logits.double()
    want = torch.log(bound + (1 - bound) * torch.sigmoid(wide)) if bound else F.logsigmoid(wide)
    assert (log_f <= 0).all()
    torch.testing.assert_close(log_f.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(write.double(), (1 - bound) * torch.sigmoid(-wide), rtol=1e-5, atol=1e-30)
    (inputs.log_decay.sum() + inputs.k.sum()).backward()
    assert x.grad.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in rule.parameters())


@pytest.mark.parametrize("logit", [89.0, 1e6])
def test_decays_of_rwkv6_at_their_end_are_zero_and_finite(logit: float) -> None:
    """exp of the logit is infinite in fp32; its decay has long been 0, and so has its gradient."""
    mixer = mixer_spec("rwkv6").build(CONTEXT)
    with torch.no_grad():
        mixer.decay.fill_(logit)
    x = torch.randn(2, 20, CONTEXT.dim, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y, _ = mixer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert mixer.decay.grad is not None and not mixer.decay.grad.any()


def test_one_write_per_token_is_gated_delta_net() -> None:
    product = mixer_spec("gated_delta_product", steps=1, expand_k=0.5).build(CONTEXT).double()
    net = mixer_spec("gated_delta_net", expand_k=0.5, negative_eigenvalues=True).build(CONTEXT).double()
    net.load_state_dict({name.replace("write.", ""): weight for name, weight in product.state_dict().items()})
    assert_close("y", product(tokens(30))[0], net(tokens(30))[0], 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_feedback_of_comba_before_decays_that_erase_the_state(dtype: torch.dtype) -> None:
    """The share of the state that a write replaces is divided by the decay, which may be as small as one likes."""
    case = next(case for case in CASES if case.mixer == "comba")
    outputs = []
    for of in (dtype, torch.float64):
        mixer = case.build(torch.float32)
        mixer.rule.delta.steps.dt_bias.data.copy_(torch.tensor([-5.0, 8.0, 30.0, 1e4]))
        mixer.rule.delta.steps.A_log.data.fill_(1.0)
        mixer = mixer.to(dtype).to(of)
        x = tokens(40, dtype).to(of).requires_grad_()
        y, _ = mixer(x)
        y.sum().backward()
        assert x.grad.isfinite().all() and all(weight.grad.isfinite().all() for weight in mixer.parameters())
        outputs.append(y)
    assert relative(*outputs) < {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
