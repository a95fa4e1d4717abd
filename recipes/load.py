"""Load a recipe from YAML files and ``key=value`` arguments, and dump one as YAML.

The later source wins: dataclass < base YAML (a file names its base with ``base:``) < recipe < ``key=value``.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from recipes.config import (
    FORMAT,
    FREE_KEYS,
    NAME_BYTES,
    STRATEGY_KEYS,
    TEXT_KEYS,
    UNNAMED,
    Recipe,
    RecipeError,
    check_format,
    first_line,
    leaves,
)
from recipes.typed_yaml import key_and_text, override, read, refuse_text, typed

SCHEMA = OmegaConf.structured(Recipe)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, its bases and ``key=value`` overrides into a Recipe.

    The default name is the file's name, followed by the overrides of model, data, train, optim and the strategies of
    parallel. Different runs therefore do not share a folder. Raise RecipeError for an unknown key (with the nearest
    valid one), a wrong type or a file that cannot be read.
    """
    path = Path(path)
    changes = [(f"argument {argument!r}", override(argument, Recipe)) for argument in overrides]
    recipe = _recipe([(str(path), {"name": path.stem}), *_layers(path), *changes])
    values = dict(map(key_and_text, overrides))
    if "name" in values:
        return recipe
    return replace(recipe, name=file_name("-".join([recipe.name, *_changes(values)])))


def file_name(name: str) -> str:
    """Return ``name``; shorten one that is too long for a file and append a hash of the whole name."""
    whole = name.encode(errors="replace")
    if len(whole) <= NAME_BYTES:
        return name
    return f"{whole[: NAME_BYTES - 9].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"


def load_resolved(path: str | Path) -> Recipe:
    """Read the ``recipe.yaml`` of a run folder; raise RecipeError as `load_recipe` does."""
    return _recipe([(str(path), _values(Path(path), UNNAMED))])


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, after its format; `load_resolved` reads it back."""
    return f"format: {FORMAT}\n" + OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return the values of a file and of its bases, each with its path, outermost base first."""
    if path.resolve() in above:
        raise RecipeError(f"{path}: base: names a file that leads back to itself; remove one `base:`")
    values = _values(path)
    base = values.pop("base", None)
    below = _layers(path.parent / str(base), (*above, path.resolve())) if base else []
    return [*below, (str(path), values)]


def _values(path: Path, unnamed: int = FORMAT) -> dict[str, Any]:
    """Return the values of one file and check its format, which is `unnamed` if the file names none."""
    values = typed(read(path), Recipe)
    check_format(values.pop("format", unnamed), path)
    return values


def _recipe(layers: Sequence[tuple[str, dict[str, Any]]]) -> Recipe:
    """Merge layers, each with its source, into a recipe; later layers win.

    Merging all layers at once is fast. If that fails, merge key by key, so that the error can name its key.
    """
    for source, layer in layers:
        refuse_text(layer, source)
    try:
        merged = OmegaConf.merge(SCHEMA, *(layer for _, layer in layers))
    except (OmegaConfBaseException, TypeError):  # OmegaConf raises TypeError for a mapping in place of a list
        merged = SCHEMA
        for source, layer in layers:
            for key, value in leaves(layer):
                merged = _with_key(merged, key, value, source)
    source = layers[0][0]
    try:
        if missing := OmegaConf.missing_keys(merged):
            raise RecipeError(f"{source}: {', '.join(sorted(missing))} is missing")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise RecipeError(f"{source}: {first_line(error)}") from error


def _with_key(merged: Any, key: str, value: Any, source: str) -> Any:
    section, _, leaf = key.partition(".")
    try:
        return OmegaConf.merge(merged, {section: {leaf: value} if leaf else value})
    except (OmegaConfBaseException, TypeError) as error:
        # A known key can hold a mapping with an unknown key; then the value is at fault.
        if isinstance(error, ConfigKeyError) and _nearest(key) != key:
            raise RecipeError(f"{source}: unknown key {key!r}; the nearest is {_nearest(key)!r}") from error
        raise RecipeError(f"{source}: {key}={value!r}: {first_line(error)}") from error


def _nearest(key: str) -> str:
    """Find the valid key that is most like ``key``, by its last part and by the whole key."""

    def likeness(name: str) -> float:
        pairs = (name.rpartition(".")[2], key.rpartition(".")[2]), (name, key)
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max((name for name, _ in leaves(OmegaConf.to_container(SCHEMA))), key=likeness)


def _changes(values: dict[str, str]) -> list[str]:
    """Describe overrides for the name of a run: model.ratio=1/8 becomes ratio-1-8."""
    return [
        re.sub(r"[^\w.]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-")
        for key, value in values.items()
        if key.startswith((*STRATEGY_KEYS, *TEXT_KEYS)) or not key.startswith(FREE_KEYS)
    ]
