"""The import graph of the engine, read from its source: which wing or top file imports which.

A wing is a folder of `hybrid_sp`. A top file is a file directly in `hybrid_sp`, such as `__init__`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

ENGINE = Path(__file__).parents[2] / "hybrid_sp"
LEVELS: tuple[frozenset[str], ...] = tuple(  # the lowest first: a wing may import its own level and lower ones
    frozenset(names.split())
    for names in (
        "comm kernels backends eager transfer",
        "shard mesh gradients",
        "overlap recompute checks",
        "exchange",
        "baselines",
        "ops",
        "__init__",
    )
)

Arrow = tuple[str, str]  # importer, imported


def wings(package: Path = ENGINE) -> set[str]:
    """Return the names of the package's wings and top files."""
    return {_wing(file, package) for file in package.rglob("*.py")}


def arrows(package: Path = ENGINE) -> set[Arrow]:
    """Return every (importer, imported) pair of different wings, from imports anywhere in their files."""
    known = wings(package)
    found = set()
    for file in package.rglob("*.py"):
        above = ".".join([package.name, *file.parent.relative_to(package).parts])
        for name in _modules(ast.parse(file.read_text()), above):
            first, *rest = name.split(".")
            if first == package.name and rest:
                found.add((_wing(file, package), rest[0] if rest[0] in known else "__init__"))
    return {(importer, imported) for importer, imported in found if importer != imported}


def upward(found: Iterable[Arrow]) -> list[Arrow]:
    """Return the arrows that lead to a higher level than they start from."""
    return sorted(arrow for arrow in found if level(arrow[1]) > level(arrow[0]))


def level(wing: str) -> int:
    """Return the number of the wing's level, 0 for the lowest; raises ValueError if no level has it."""
    for place, names in enumerate(LEVELS):
        if wing in names:
            return place
    raise ValueError(
        f"no level has {wing!r}: put it into LEVELS of analysis/drawings/graph.py and of tests/test_house.py"
    )


def downward(names: Iterable[str], found: Iterable[Arrow]) -> list[str]:
    """Sort wings from the highest level to the lowest, so that every arrow leads to a later one.

    Within a level an importer comes before the wings that it imports. Raises ValueError if an arrow leads upward, or if
    wings of one level import each other.
    """
    if wrong := upward(found):
        raise ValueError(f"imports lead upward: {', '.join(' -> '.join(arrow) for arrow in wrong)}")
    importers: dict[str, list[str]] = {name: [] for name in sorted(names)}
    for importer, imported in sorted(found):
        importers[imported].append(importer)
    try:
        order = [*TopologicalSorter(importers).static_order()]
    except CycleError as error:
        raise ValueError(f"wings of one level import each other: {', '.join(sorted({*error.args[1]}))}") from None
    return sorted(order, key=level, reverse=True)


def _wing(file: Path, package: Path) -> str:
    return file.relative_to(package).parts[0].removesuffix(".py")


def _modules(tree: ast.AST, above: str) -> Iterator[str]:
    """Yield the dotted names that a file imports; `above` is the package of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), above)
            yield from (f"{module}.{alias.name}" for alias in node.names)
