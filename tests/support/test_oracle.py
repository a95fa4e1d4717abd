"""The oracle against closed forms (float64) and against fla-core's naive functions (float32, 1e-5)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.oracle import assert_close, linear_attention_loop, relative, softmax_attention_loop

B, T, G, H, K, V = 2, 13, 2, 4, 3, 5


def inputs(dtype: torch.dtype = torch.float64, heads: int = G) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (B, T, heads, K), (B, T, heads, K), (B, T, H, V)
    q, k, v = (torch.randn(size, dtype=dtype) for size in sizes)
    return q, k, v


def decays(dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    sizes = {"H": (H,), "BTH": (B, T, H), "BTHK": (B, T, H, K)}
    return {"none": None} | {name: F.logsigmoid(torch.randn(size, dtype=dtype)) for name, size in sizes.items()}


@pytest.mark.parametrize("name", ["none", "H", "BTH", "BTHK"])
def test_linear_loop_is_the_dense_sum(name: str) -> None:
    """o_i = scale * sum over j <= i of (q_i exp(c_i - c_j) . k_j) v_j + scale * q_i exp(c_i) S_0; c sums the decays."""
    q, k, v = inputs()
    log_decay = decays()[name]
    S_0 = torch.randn(B, H, K, V, dtype=torch.float64)
    o, S = linear_attention_loop(q, k, v, log_decay, scale=0.7, initial_state=S_0)

    steps = torch.zeros(B, T, H, K, dtype=torch.float64)
    if log_decay is not None:
        steps = steps + (log_decay[:, None] if name == "H" else log_decay[..., None] if name == "BTH" else log_decay)
    c = steps.cumsum(1)
    key_head = torch.tensor([h // (H // G) for h in range(H)])
    q, k = q[:, :, key_head], k[:, :, key_head]
    weights = torch.einsum("bihk,bijhk,bjhk->bijh", q, (c[:, :, None] - c[:, None]).exp(), k)
    weights = weights * torch.ones(T, T, dtype=torch.float64).tril()[None, :, :, None]
    want = torch.einsum("bijh,bjhv->bihv", weights, v) + torch.einsum("bihk,bhkv->bihv", q * c.exp(), S_0)
    want_S = c[:, -1, :, :, None].exp() * S_0 + torch.einsum("bjhk,bjhv->bhkv", (c[:, -1:] - c).exp() * k, v)
    assert_close("o", o, 0.7 * want, 1e-13)
    assert_close("S", S, want_S, 1e-13)


def test_normalizer_and_bidirectional() -> None:
    q, k, v = (x.abs() for x in inputs(heads=H))
    z_0 = torch.rand(B, H, K, dtype=torch.float64)
    S_0 = torch.rand(B, H, K, V, dtype=torch.float64)
    o, (S, z) = linear_attention_loop(q, k, v, normalize=True, initial_state=(S_0, z_0))
    ones = torch.ones(B, T, H, 1, dtype=torch.float64)
    plain, _ = linear_attention_loop(q, k, torch.cat([v, ones], -1), initial_state=torch.cat([S_0, z_0[..., None]], -1))
    assert_close("o", o, plain[..., :-1] / (plain[..., -1:] + 1e-10), 1e-13)
    assert_close("z", z, z_0 + k.sum(1), 1e-13)

    both, _ = linear_attention_loop(q, k, v, causal=False)
    S_all = torch.einsum("bthk,bthv->bhkv", k, v)
    assert_close("bidirectional", both, K**-0.5 * torch.einsum("bthk,bhkv->bthv", q, S_all), 1e-13)


@pytest.mark.parametrize("causal", [True, False])
def test_softmax_loop_is_torch_sdpa(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, K, dtype=torch.float64) for heads in (H, G, G))
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True)
    assert_close("o", softmax_attention_loop(q, k, v, causal=causal), want.transpose(1, 2), 1e-13)


def test_assert_close_says_what_and_where() -> None:
    want = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(AssertionError, match=r"dq on rank 2: relative error 0.18.*worst at \(1, 0\): got 2, want 3"):
        assert_close("dq on rank 2", torch.tensor([[1.0, 2.0], [2.0, 4.0]]), want, 1e-6)
    with pytest.raises(AssertionError, match=r"worst at \(0, 1\): got nan"):
        assert_close("o", torch.tensor([[1.0, float("nan")], [3.0, 4.0]]), want, 1e-6)
    with pytest.raises(AssertionError, match="got None, want"):
        assert_close("dk", None, want, 1e-6)
    with pytest.raises(AssertionError, match="shapes|got torch"):
        assert_close("o", want[0], want, 1e-6)
    assert relative(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative(torch.full((2,), 1e-30), torch.zeros(2)) == float("inf")


def test_against_fla_naive() -> None:
    """In a process of its own: importing fla takes seconds, and none of it should be left in this one."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, __file__], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) == 10
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


def errors_against_fla() -> dict[str, float]:
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.retention.naive import naive_retention
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla, naive_recurrent_simple_gla

    q, k, v = inputs(torch.float32, heads=H)
    wide = [x.double() for x in (q, k, v)]
    decay = decays(torch.float32)
    S_0 = torch.randn(B, H, K, V)
    retention_decay = torch.log1p(-(2.0 ** -(5.0 + torch.arange(H, dtype=torch.float64))))
    retention = naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    pairs = {
        "linear": (
            naive_recurrent_linear_attn(q, k, v, initial_state=S_0, output_final_state=True),
            linear_attention_loop(*wide, initial_state=S_0.double()),
        ),
        "normalized": (
            (naive_recurrent_linear_attn(q.abs(), k.abs(), v, normalize=True)[0], None),
            (linear_attention_loop(*(x.abs() for x in wide[:2]), wide[2], normalize=True)[0], None),
        ),
        "simple_gla": (
            naive_recurrent_simple_gla(q, k, v, decay["BTH"], initial_state=S_0),
            linear_attention_loop(*wide, decay["BTH"].double(), initial_state=S_0.double()),
        ),
        "simple_gla_chunk": (
            naive_chunk_simple_gla(q, k, v, decay["BTH"], output_final_state=True, chunk_size=4),
            linear_attention_loop(*wide, decay["BTH"].double()),
        ),
        "gla": (
            naive_recurrent_gla(q, k, v, decay["BTHK"], initial_state=S_0, output_final_state=True),
            linear_attention_loop(*wide, decay["BTHK"].double(), initial_state=S_0.double()),
        ),
        "retention": ((retention, None), (linear_attention_loop(*wide, retention_decay)[0], None)),
    }
    errors = {}
    for name, (theirs, ours) in pairs.items():
        for part, got, want in zip(("o", "S"), ours, theirs, strict=True):
            if want is not None:
                errors[f"{name}.{part}"] = relative(got, want)
    return errors


if __name__ == "__main__":
    print(json.dumps(errors_against_fla()))
