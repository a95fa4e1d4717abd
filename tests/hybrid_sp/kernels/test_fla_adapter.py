"""The delta rule by the passes of fla-core: they are what we take them for, and what we make of them is right.

fla's own kernels run in Triton's interpreter, in a program of their own (`tests/external/fla_passes.py`).
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hybrid_sp as hsp
from hybrid_sp.kernels.gpu import fla_delta
from hybrid_sp.kernels.pieces import Spans
from hybrid_sp.ops import delta_rule
from tests.external.program import Errors, errors_of
from tests.support.packages import needs
from tests.support.tiers import tiered

needs_fla = needs("fla", "triton")

CONTRACT = {  # arguments and results of every pass, as fla-core 0.6 has them
    "chunk_local_cumsum": (
        "g chunk_size reverse=False scale=None cu_seqlens=None output_dtype=torch.float chunk_indices=None "
        "use_graph=False"
    ),
    "prepare_chunk_indices": "cu_seqlens chunk_size cu_seqlens_cpu=None",
    "prepare_chunk_offsets": "cu_seqlens chunk_size",
    "chunk_gated_delta_rule_fwd_intra": (
        "k v g=None beta=None cu_seqlens=None chunk_size=64 chunk_indices=None -> w, u, A"
    ),
    "recompute_w_u_fwd": "k v beta A g=None cu_seqlens=None chunk_indices=None -> w, u",
    "prepare_wy_repr_bwd": "k v beta A dw du g=None cu_seqlens=None chunk_indices=None -> dk, dv, db, dg",
    "chunk_gated_delta_rule_fwd_h": (
        "k w u g=None gk=None initial_state=None output_final_state=False chunk_size=64 save_new_value=True "
        "state_v_first=False cu_seqlens=None cu_seqlens_cpu=None chunk_indices=None chunk_offsets=None -> h, "
        "v_new, final_state"
    ),
    "chunk_gated_delta_rule_bwd_dhu": (
        "q k w do dv g=None gk=None h0=None dht=None scale=None state_v_first=False cu_seqlens=None chunk_size=64 "
        "chunk_indices=None chunk_offsets=None use_graph=False -> dh, dh0, dv2"
    ),
    "chunk_fwd_o": (
        "q k v h g=None g_gamma=None scale=None state_v_first=False cu_seqlens=None chunk_size=64 "
        "chunk_indices=None -> o"
    ),
    "chunk_bwd_dv_local": (
        "q k do g=None g_gamma=None A=None scale=None cu_seqlens=None chunk_size=64 chunk_indices=None -> dv"
    ),
    "chunk_bwd_dqkwg": (
        "q k v do h dh w=None g=None g_gamma=None dv=None scale=None state_v_first=False cu_seqlens=None "
        "chunk_size=64 chunk_indices=None -> dq, dk, dw, dg"
    ),
    "chunk_kda_fwd_intra": (
        "q k v gk=None beta=None scale=None cu_seqlens=None chunk_size=64 chunk_indices=None safe_gate=False "
        "lower_bound=None disable_recompute=False use_graph=False -> w, u, qg, kg, Aqk, Akk"
    ),
    "chunk_kda_bwd_intra": (
        "q k g beta dAqk dAkk dq dk db dg cu_seqlens=None chunk_indices=None chunk_size=64 safe_gate=False "
        "lower_bound=None use_graph=False -> dq, dk, db, dg"
    ),
    "chunk_kda_recompute": "k v beta A gk q=None cu_seqlens=None chunk_indices=None use_graph=False -> w, u, qg, kg",
    "chunk_kda_bwd_dAv": (
        "q k v do A=None scale=None cu_seqlens=None chunk_size=64 chunk_indices=None use_graph=False -> dA, dv"
    ),
    "chunk_kda_bwd_wy_dqkg_fused": (
        "q k v v_new g beta A h do dh dv scale=None state_v_first=False cu_seqlens=None chunk_size=64 "
        "chunk_indices=None chunk_offsets=None use_graph=False -> dq, dk, dv, db, dg, dA"
    ),
    "chunk_gla_fwd_o_gk": (
        "q v g A h scale state_v_first=False cu_seqlens=None chunk_size=64 chunk_indices=None use_graph=False -> o"
    ),
}


@functools.cache
def parsed(module: str) -> ast.Module:
    """The source of a module, found without importing fla."""
    fla = importlib.util.find_spec("fla")
    assert fla is not None and fla.submodule_search_locations
    path = Path(fla.submodule_search_locations[0], *module.split(".")[1:])
    path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    assert path.exists(), f"fla-core has no {module} any more"
    return ast.parse(path.read_text())


def written(function: ast.FunctionDef) -> str:
    """A function's arguments and results, as CONTRACT writes them."""
    names = [x.arg for x in function.args.args]
    defaults = ["=" + ast.unparse(x) for x in function.args.defaults]
    defaults = [""] * (len(names) - len(defaults)) + defaults
    returned = [ast.unparse(x.value).strip("()") for x in function.body if isinstance(x, ast.Return) and x.value]
    return " ".join(map("".join, zip(names, defaults, strict=True))) + "".join(f" -> {x}" for x in returned)


@needs_fla
@pytest.mark.parametrize("name", fla_delta.PASSES)
def test_a_pass_of_fla_is_what_we_call(name: str) -> None:
    module, function = fla_delta.PASSES[name].split(":")
    found = [x for x in parsed(module).body if isinstance(x, ast.FunctionDef) and x.name == function]
    assert found, f"{module} has no function {function} any more"
    is_now = written(found[0])
    assert (is_now if "->" in CONTRACT[name] else is_now.split(" -> ")[0]) == CONTRACT[name]


@needs_fla
@pytest.mark.parametrize("name", fla_delta.VALUES)
def test_a_value_of_fla_is_there(name: str) -> None:
    module, value = fla_delta.VALUES[name].split(":")
    source = parsed(module)
    bound = {alias.asname or alias.name for x in ast.walk(source) if isinstance(x, ast.ImportFrom) for alias in x.names}
    bound |= {x.id for x in ast.walk(source) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    assert value in bound, f"{module} has no {value} any more"


GRADIENTS = {"dq", "dk", "dv", "dbeta"}
ORDER = {"order forward", "order backward"}
BOUNDS = {"half": 2e-3, "strong": 1e-3}  # fp16; sums of strong decays. Else 5e-6, the promise of one device
CASES = {  # what the program compares: kind, and whether states are given and asked for
    "delta alone": False,
    "gated alone, states": True,
    "gated alone, documents": False,
    "kda alone, documents": False,
    "kda alone, states": True,
    "strong, gated": True,
    "strong, kda": True,
    "half": True,
    "delta on 2, zigzag, documents": False,
    "gated on 2, states": True,
    "half, on 2": True,
    "kda on 2, zigzag, documents, states": True,
    "delta on 3, states": True,
    "gated on 3, documents, states": True,
    "kda on 3, zigzag": False,
}


FIRST = ["delta on 2, zigzag, documents", "half, on 2", "kda on 2, zigzag, documents, states"]


@pytest.fixture(scope="module")
def errors(request: pytest.FixtureRequest) -> Errors:
    """By one program, of all cases; or of those alone whose tests have been chosen, where no other test needs them."""
    here = [item for item in request.session.items if item.path == request.node.path]
    asking = [item for item in here if "errors" in getattr(item, "fixturenames", ())]
    chosen = {item.callspec.params["case"] if hasattr(item, "callspec") else None for item in asking}
    return errors_of("fla_passes", *(() if None in chosen else sorted(chosen)))


@needs_fla
@pytest.mark.slow
def test_every_case_is_reported(errors: Errors) -> None:
    assert errors.keys() == CASES.keys()


@needs_fla
@pytest.mark.parametrize("case", tiered(FIRST, [case for case in CASES if case not in FIRST]))
def test_agrees_with_the_token_loop(errors: Errors, case: str) -> None:
    """Outputs, final states and every gradient on every rank; the exchange leaves before the work that hides it."""
    found, bound = errors[case], BOUNDS.get(case.split(",")[0], 5e-6)
    expected = {"o", *GRADIENTS, *ORDER} | ({"final0", "dinitial"} if CASES[case] else set())
    assert found.keys() == (expected if case.startswith("delta") else expected | {"dlog_decay"})
    assert {name: error for name, error in found.items() if not error <= bound} == {}


@needs_fla
@pytest.mark.slow
def test_cutting_costs_no_precision_in_half(errors: Errors) -> None:
    """The summaries and what is read of them are rounded as the states of one device are."""
    one, two = errors["half"], errors["half, on 2"]
    assert {name: (one[name], error) for name, error in two.items() if not error <= 2 * one[name]} == {}


def call(**changed: Any) -> torch.Tensor:
    make = torch.Generator().manual_seed(0)
    x = {name: torch.randn(1, 6, 2, 4, generator=make) for name in "qkv"}
    return hsp.delta_rule(**x, beta=torch.rand(1, 6, 2, generator=make), **changed)


def test_a_missing_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_rule, "select_backend", lambda *_: "fla")
    monkeypatch.setattr(fla_delta, "PASSES", {"chunk_fwd_o": "no_such_package.ops:chunk_fwd_o"})
    fla_delta.passes.cache_clear()
    try:
        with pytest.raises(ImportError, match=r'pip install "hybrid_sp\[fla\]".*backend="torch"'):
            call()
    finally:
        fla_delta.passes.cache_clear()


@pytest.mark.parametrize(("hopper", "new"), [(True, False), (True, True), (False, False)])
def test_decays_per_head_become_vectors_where_triton_is_wrong(
    monkeypatch: pytest.MonkeyPatch, hopper: bool, new: bool
) -> None:
    there = SimpleNamespace(HOPPER=hopper, TRITON_3_4_0=True, TRITON_3_7_1=new)
    monkeypatch.setattr(fla_delta, "passes", lambda: there)
    g = torch.zeros(1, 6, 2).requires_grad_()
    used = fla_delta.decay_of(g, 4)
    assert used is not None
    assert used.shape == ((1, 6, 2, 4) if hopper and not new else (1, 6, 2))
    (dg,) = torch.autograd.grad(used.sum(), g)
    assert torch.equal(dg, torch.full_like(g, 4.0 if hopper and not new else 1.0))
    assert fla_delta.decay_of(None, 4) is None


def test_runs_of_two_rows_with_documents_inside_and_at_the_edges_of_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    def indices(cu_seqlens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return cu_seqlens

    there = SimpleNamespace(prepare_chunk_indices=indices, prepare_chunk_offsets=indices)
    monkeypatch.setattr(fla_delta, "passes", lambda: there)
    runs = fla_delta._runs.__wrapped__(Spans((5, 4, 3), (2, 5, 7)), 2, torch.device("cpu"), 64)  # not from the cache
    assert runs.tokens["cu_seqlens"].tolist() == [0, 2, 5, 7, 9, 12, 14, 17, 19, 21, 24]
    assert runs.pieces.bounds == (0, 2, 4, 5)
    entered = [(run, piece.start, piece.stop, piece.span) for run, piece in runs.entered]
    assert entered == [(0, 0, 2, 0), (4, 9, 12, 2)]  # a document begins the second span
