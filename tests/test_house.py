"""The house rules that a program can check: arrows, rooms, communication, what the engine needs, and public names."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hybrid_sp

ROOT = Path(__file__).parents[1]
ROOMS = ["hybrid_sp", "layers", "recipes", "analysis"]
LEVELS = [  # of the engine: a wing imports its own level or one before it
    {"comm", "kernels", "backends", "eager", "transfer"},
    {"shard", "mesh", "gradients"},
    {"overlap", "recompute", "checks"},
    {"exchange"},
    {"baselines"},
    {"ops"},
    {"__init__"},
]
DISTRIBUTED = {  # who may touch torch.distributed, and which part of it
    "hybrid_sp/comm/": "torch.distributed",
    "hybrid_sp/mesh.py": "torch.distributed",
    "recipes/checkpoint.py": "torch.distributed.checkpoint",
}
NOT_FOR_THE_ENGINE = ["omegaconf", "wandb", "matplotlib", "rich", "triton", "fla", "flash_attn"]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def modules_used(source: str, package: str = "") -> Iterator[str]:
    """Dotted names that a source file of this package imports, at any depth, and torch.distributed spelled as an
    attribute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "unknown"


def test_modules_used_sees_every_form() -> None:
    source = """
import layers.model as model
def lazy():
    from recipes import train
    importlib.import_module("analysis.report")
    torch.distributed.barrier()
"""
    used = set(modules_used(source))
    assert used == {
        "layers.model",
        "recipes.train",
        "analysis.report",
        "torch.distributed.barrier",
        "torch.distributed",
    }


def rooms_to_the_right(path: Path) -> list[str]:
    """A test of a room obeys that room's arrows, so that the rooms to its right can be deleted."""
    parts = path.relative_to(ROOT).parts
    room = parts[1] if parts[0] == "tests" else parts[0]
    return ROOMS[ROOMS.index(room) + 1 :] if room in ROOMS else []


def test_arrows() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(*ROOMS, "tests")
        for name in modules_used(path.read_text())
        if name.split(".")[0] in rooms_to_the_right(path)
    ]
    assert not wrong, "import your own room or one to the left (hybrid_sp < layers < recipes < analysis)"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def file_imports(*rooms: str) -> dict[str, set[str]]:
    """For each module of these rooms the modules that it imports of them, wherever in the file."""
    files = {module_of(path): path for path in python_files(*rooms)}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = set(modules_used(path.read_text(), package))
        found[module] = {name if name in files else name.rpartition(".")[0] for name in names} & files.keys() - {module}
    return found


def level(module: str) -> int:
    wing = (module.split(".") + ["__init__"])[1]
    return next(i for i, wings in enumerate(LEVELS) if wing in wings)


def test_wings_of_the_engine_are_in_order() -> None:
    wrong = [
        f"{module} imports {used}"
        for module, imports in file_imports("hybrid_sp").items()
        for used in imports
        if level(used) > level(module)
    ]
    assert not wrong, f"a wing of the engine imports its own level or one before it: {LEVELS}"


def test_no_imports_in_a_circle() -> None:
    """Not even for types, and not within a function."""
    imports, before = file_imports(*ROOMS), 0
    while len(imports) != before:  # leave out what imports nothing, or is not imported
        before, used = len(imports), set().union(*imports.values())
        imports = {module: names & imports.keys() for module, names in imports.items() if names and module in used}
    assert not imports, "these import each other"


def test_only_comm_and_the_mesh_communicate() -> None:
    wrong = []
    for path in python_files(*ROOMS):
        name = path.relative_to(ROOT).as_posix()
        allowed = next((part for place, part in DISTRIBUTED.items() if name.startswith(place)), None)
        for used in modules_used(path.read_text()):
            if (used + ".").startswith("torch.distributed.") and not (allowed and used.startswith(allowed)):
                wrong.append(f"{name} uses {used}")
    assert not wrong, "communication goes through hybrid_sp/comm/"


def test_files_are_short_and_named_for_what_they_hold() -> None:
    for path in python_files(*ROOMS, "tests"):
        length = len(path.read_text().splitlines())
        assert length <= 500, f"{path.relative_to(ROOT)} has {length} lines: split it (at most 500, aim at 250)"
        assert not {"utils", "util", "common", "helpers", "misc"} & {path.stem, *path.relative_to(ROOT).parts}, path


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/layers would shadow the package layers"


def test_the_engine_needs_torch_and_einops_alone() -> None:
    """With the optional packages missing altogether; and importing it starts neither CUDA nor a process group, nor
    does it import torch's compiler."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_FOR_THE_ENGINE}))  # importing None raises ModuleNotFoundError
import hybrid_sp, torch
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert "torch._dynamo" not in sys.modules, "this costs every process a second"
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", hybrid_sp.__all__)
def test_public_names_are_hinted_and_documented(name: str) -> None:
    thing = getattr(hybrid_sp, name)
    callables = {name: thing}
    if inspect.isclass(thing):
        members = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
        callables = {f"{name}.{key}": value for key, value in members.items() if inspect.isfunction(value)}
    assert thing.__doc__, f"{name} has no docstring"
    for label, function in callables.items():
        assert function.__doc__, f"{label} has no docstring"
        signature = inspect.signature(function)
        bare = [key for key, value in signature.parameters.items() if value.annotation is inspect.Parameter.empty]
        assert not set(bare) - {"self"}, f"{label}: no hint for {bare}"
        assert signature.return_annotation is not inspect.Signature.empty, f"{label}: no hint for what it returns"
