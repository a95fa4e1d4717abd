"""The adapter of the flash-attn package: the facts it relies on, held against whatever is installed, and its
mathematics with a package of those facts that computes on the CPU."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrid_sp as hsp
from hybrid_sp import backends
from hybrid_sp.kernels.softmax import attend, flash_attn
from hybrid_sp.kernels.softmax.layout import flash_dim
from tests.hybrid_sp.kernels.test_softmax_kernels import (
    aligned,
    attention,
    attention_backward,
    awkward,
    compare,
    in_two_blocks,
    leaves,
    truth,
)

# What the adapter calls, as in flash-attn 2.8.3.post2 and flash-attn-4 4.0.0b36: the names of all arguments without a
# default, those with one that we pass, and the first things that are returned.
FACTS = {
    "flash_attn/flash_attn_interface.py": {
        "_flash_attn_forward": (
            "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
            "return_softmax",
            "",
            ["out", "softmax_lse"],
        ),
        "_flash_attn_backward": (
            "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left window_size_right "
            "softcap alibi_slopes deterministic",
            "",
            [],
        ),
    },
    "flash_attn/cute/interface.py": {
        "_flash_attn_fwd": ("q k v", "softmax_scale causal return_lse", ["out", "lse"]),
        "_flash_attn_bwd": ("q k v out dout lse", "softmax_scale causal deterministic", ["dq", "dk", "dv"]),
    },
}
# How each says that its lse is [B,H,T] in fp32.
LSE = {
    "flash_attn/flash_attn_interface.py": [
        "softmax_lse = torch.empty((batch_size, num_heads, seqlen_q), dtype=torch.float32",
    ],
    "flash_attn/cute/interface.py": [
        "lse_shape = (batch_size, num_head, seqlen_q) if cu_seqlens_q is None",
        "torch.empty(lse_shape, dtype=torch.float32, device=device) if requires_grad or return_lse",
        "assert lse.shape == (batch_size, num_head, seqlen_q)",
    ],
}
VERSIONS = {"flash-attn": "2.8.3.post2", "flash-attn-4": "4.0.0b36"}
CHIPS = {"flash-attn": (8, 0), "flash-attn-4": (9, 0)}


def source(name: str, path: str) -> str:
    """A file of an installed package, without importing it. (flash-attn 2.8 has an older `cute` of its own.)"""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    spec = importlib.util.find_spec("flash_attn")
    assert spec is not None and spec.submodule_search_locations is not None
    (file, *_) = (file for place in spec.submodule_search_locations if (file := Path(place).parent / path).exists())
    return file.read_text()


def returned_first(function: ast.FunctionDef, count: int) -> list[list[str]]:
    """The first things that a function returns, on each of its ways out."""
    ways = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    ways = [end for way in ways for end in ([way.body, way.orelse] if isinstance(way, ast.IfExp) else [way])]
    return [[ast.unparse(x) for x in way.elts[:count]] if isinstance(way, ast.Tuple) else [] for way in ways]


@pytest.mark.parametrize(("name", "path"), [*zip(VERSIONS, FACTS, strict=True)])
def test_the_facts_hold_for_what_is_installed(name: str, path: str) -> None:
    tree = ast.parse(source(name, path))
    for name, (required, optional, returned) in FACTS[path].items():
        (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        names = [x.arg for x in function.args.args]
        assert not function.args.posonlyargs and all(x is not None for x in function.args.kw_defaults)
        without = names[: len(names) - len(function.args.defaults)]
        assert set(without) <= set(required.split()) <= set(names), f"{name} needs {without}"
        assert set(optional.split()) <= set(names), f"{name} takes {names}"
        if returned:
            ways = returned_first(function, len(returned))
            assert ways and all(way == returned for way in ways), f"{name} returns {ways}"
    flat = " ".join(ast.unparse(tree).split())
    assert all(" ".join(line.split()) in flat for line in LSE[path])


def signature(required: str, optional: str) -> inspect.Signature:
    kind, none = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    names = [(name, none) for name in required.split()] + [(name, None) for name in optional.split()]
    return inspect.Signature([inspect.Parameter(name, kind, default=default) for name, default in names])


class Stand:
    """The functions of both versions, with the arguments of FACTS and no others, in the dtype of q."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def module(self, path: str) -> ModuleType:
        made = ModuleType(path.removesuffix(".py").replace("/", "."))
        for name, (required, optional, _) in FACTS[path].items():
            setattr(made, name, self.function(name, signature(required, optional)))
        return made

    def function(self, name: str, arguments: inspect.Signature) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = arguments.bind(*args, **kwargs).arguments
            self.called.append(name)
            assert all(aligned(x) and x.shape[-1] % 8 == 0 for key, x in given.items() if key in ("q", "k", "v", "out"))
            if name == "_flash_attn_backward":
                return self.two_backward(given)
            return self.backward(given) if "dout" in given else self.forward(given)

        call.__signature__ = arguments  # type: ignore[attr-defined]
        return call

    @staticmethod
    def forward(given: dict[str, Any]) -> tuple[Any, ...]:
        if "return_lse" in given:
            assert given["return_lse"] is True
        else:
            Stand.check_two(given)
        q, k, v = (given[name].transpose(1, 2) for name in "qkv")
        o, lse = attention(q, k, v, Stand.seen(given), given["softmax_scale"])
        return o.transpose(1, 2).contiguous(), lse, None, None, None

    @staticmethod
    def backward(given: dict[str, Any]) -> tuple[Any, ...]:
        assert given["lse"].is_contiguous() and given["deterministic"] is True
        blocks = (given[name].transpose(1, 2) for name in ("dout", "q", "k", "v", "out"))
        grads = attention_backward(*blocks, given["lse"], Stand.seen(given), given["softmax_scale"])
        return tuple(grad.transpose(1, 2) for grad in grads)

    @staticmethod
    def two_backward(given: dict[str, Any]) -> Tensor:
        Stand.check_two(given)
        for name, grad in zip("qkv", Stand.backward(given | {"lse": given["softmax_lse"]}), strict=True):
            given[f"d{name}"].copy_(grad)
        return given["softmax_lse"]

    @staticmethod
    def check_two(given: dict[str, Any]) -> None:
        assert given["dropout_p"] == 0.0 == given["softcap"] and given["alibi_slopes"] is None
        assert given["window_size_left"] == -1 == given["window_size_right"] and not given.get("return_softmax")

    @staticmethod
    def seen(given: dict[str, Any]) -> Tensor:
        T, S = given["q"].shape[1], given["k"].shape[1]
        every = torch.ones(T, S, dtype=torch.bool)
        return every.tril(S - T) if given["causal"] else every


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stand]]:
    """Installs stand-ins: `there(chip, **versions)`."""
    stand = Stand()

    def install(chip: tuple[int, int], versions: dict[str, str]) -> Stand:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(flash_attn, "capability", lambda x: chip)
        for path in FACTS:
            *parents, name = path.removesuffix(".py").split("/")
            for i in range(len(parents)):
                monkeypatch.setitem(sys.modules, ".".join(parents[: i + 1]), ModuleType(parents[i]))
        for path in FACTS:
            made = stand.module(path)
            monkeypatch.setitem(sys.modules, made.__name__, made)
            parent, _, name = made.__name__.rpartition(".")
            setattr(sys.modules[parent], name, made)
        return stand

    flash_attn._package.cache_clear()
    yield install
    flash_attn._package.cache_clear()


@pytest.mark.parametrize("dim", [64, 5, 136, 200])
@pytest.mark.parametrize("name", VERSIONS)
def test_blocks(there: Callable[..., Stand], name: str, dim: int) -> None:
    stand = there(CHIPS[name], VERSIONS)
    x = leaves(19, 11, dim)
    do = torch.randn(x[0].shape, dtype=torch.float64)
    kernel = attend.select_kernel(x[0], "flash_attn")
    for form in (lambda y: y, awkward):
        compare(in_two_blocks(kernel, [form(y) for y in x], form(do)), truth(x, do), 1e-12)
    assert set(stand.called) == set(list(FACTS.values())[name == "flash-attn-4"])


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"causal": False}], ids=str)
@pytest.mark.parametrize("softmax", ["all_gather", "ring", "ulysses"])
def test_the_operator_hands_the_choice_down(
    monkeypatch: pytest.MonkeyPatch, there: Callable[..., Stand], softmax: str, options: dict[str, Any]
) -> None:
    """Every call is the package's, forward and backward, and the mathematics that of torch."""
    stand = there((9, 0), VERSIONS)
    monkeypatch.setattr(backends, "_unfit", lambda *args: "")
    make = torch.Generator().manual_seed(1)
    x = [torch.randn(1, 23, heads, 8, generator=make, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)]
    shard = hsp.SequenceParallel(None, softmax=softmax, layout="zigzag").shard(23, [0, 9, 23])  # two spans, for a rest

    def results(backend: str) -> list[Tensor]:
        o = hsp.softmax_attention(*x, shard=shard, backend=backend, **options)
        return [o, *torch.autograd.grad(o.square().sum(), x)]

    by_torch = results("torch")
    assert not stand.called
    monkeypatch.setattr(attend, "CPU", None)
    for got, want in zip(results("flash_attn"), by_torch, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("chip", "versions", "name"),
    [
        ((8, 0), VERSIONS, "flash-attn 2.8.3.post2"),
        ((9, 0), VERSIONS, "flash-attn-4 4.0.0b36"),
        ((10, 0), VERSIONS, "flash-attn-4 4.0.0b36"),
        ((12, 0), VERSIONS, "flash-attn 2.8.3.post2"),
        ((9, 0), {"flash-attn": "2.7.4"}, "flash-attn 2.7.4"),
        ((12, 0), {"flash-attn-4": "4.1"}, "flash-attn-4 4.1"),
    ],
    ids=str,
)
def test_versions(there: Callable[..., Stand], chip: tuple[int, int], versions: dict[str, str], name: str) -> None:
    there(chip, versions)
    assert flash_attn.package(torch.empty(1)).name == name


def test_dims() -> None:
    assert [flash_dim(dim) for dim in (1, 8, 20, 129, 192, 193, 256)] == [8, 8, 24, 136, 192, 256, 256]


@pytest.mark.parametrize(("chip", "dims"), [((9, 0), [64, 96, 128, 192, 256]), ((10, 0), [64, 128, 128, 256, 256])])
def test_dims_of_version_4(there: Callable[..., Stand], chip: tuple[int, int], dims: list[int]) -> None:
    there(chip, VERSIONS)
    assert [flash_attn.package(torch.empty(1)).dim(dim) for dim in (8, 96, 100, 160, 256)] == dims


@pytest.mark.parametrize(
    ("chip", "versions", "message"),
    [
        ((8, 6), {"flash-attn-4": "4.0"}, r"8\.6 needs flash-attn: pip install flash-attn, or use backend=\"torch\""),
        ((9, 0), {}, r"needs flash-attn-4 or flash-attn: pip install flash-attn-4, or use backend=\"torch\""),
        ((9, 0), {"flash-attn": "2.6.3"}, "2.6.3 is older than 2.7"),
    ],
    ids=str,
)
def test_a_missing_package_is_said_before_anything_else(
    monkeypatch: pytest.MonkeyPatch,
    there: Callable[..., Stand],
    chip: tuple[int, int],
    versions: dict[str, str],
    message: str,
) -> None:
    there(chip, versions)
    monkeypatch.setattr(backends, "_unfit", lambda *args: "")
    x = torch.randn(1, 4, 1, 8)
    with hsp.ledger() as book, pytest.raises(ImportError, match=message):
        hsp.softmax_attention(x, x, x, backend="flash_attn")
    assert book.calls == 0


def test_an_older_version_4_is_refused(monkeypatch: pytest.MonkeyPatch, there: Callable[..., Stand]) -> None:
    """That of flash-attn 2.8, where it has been installed over the other."""
    for versions in (VERSIONS, {"flash-attn-4": "4.0"}):
        there((9, 0), versions)
        four = sys.modules["flash_attn.cute.interface"]
        monkeypatch.setattr(four, "_flash_attn_fwd", lambda q, k, v, softmax_scale, causal: None)
        if "flash-attn" in versions:
            assert flash_attn.package(torch.empty(1)).name == "flash-attn 2.8.3.post2"
            flash_attn._package.cache_clear()
        else:
            with pytest.raises(ImportError, match=r"_flash_attn_fwd takes no \['return_lse'\]"):
                flash_attn.package(torch.empty(1))


def test_what_it_returns_is_checked(monkeypatch: pytest.MonkeyPatch, there: Callable[..., Stand]) -> None:
    """Before 2.7 the lse came fifth."""
    there((8, 0), VERSIONS)
    two = sys.modules["flash_attn.flash_attn_interface"]
    monkeypatch.setattr(two, "_flash_attn_forward", lambda q, k, v, **_: (q, q, k, v, q, q[..., 0], None, None))
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(RuntimeError, match='flash-attn 2.8.3.post2 returned .*unknown to us; use backend="torch"'):
        flash_attn.forward(x, x, x, True, 1.0)


def test_nothing_imports_the_package_unasked() -> None:
    code = """
import sys
sys.modules["flash_attn"] = None
import torch, hybrid_sp as hsp
from hybrid_sp.kernels.softmax import flash_attn
x = torch.randn(1, 4, 1, 8, requires_grad=True)
hsp.softmax_attention(x, x, x, backend="auto").sum().backward()
assert not any(name.startswith("flash_attn") for name, module in sys.modules.items() if module)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_the_cpu_is_refused() -> None:
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match='backend="flash_attn" needs a CUDA device, got cpu; use backend="torch"'):
        hsp.softmax_attention(x, x, x, backend="flash_attn")
