"""Reading a recipe: YAML files, their bases and ``key=value`` arguments become a Recipe, and a Recipe becomes YAML.

Later wins: dataclass < base YAML (a file names its own with ``base:``) < recipe < ``key=value``.
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
    Recipe,
    RecipeError,
    check_format,
    leaves,
)
from recipes.typed_yaml import key_and_text, override, read, refuse_text, typed

SCHEMA = OmegaConf.structured(Recipe)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, its bases and ``key=value`` overrides into a Recipe.

    A name that nobody gives is the file's own, followed by what the command line changed in the sections model, data,
    train and optim and in the strategies of parallel, so that different runs do not share a folder. Raises RecipeError,
    naming the key and the nearest valid one, for an unknown key, a wrong type or a file that cannot be read.
    """
    path = Path(path)
    changes = [(f"argument {argument!r}", override(argument, Recipe)) for argument in overrides]
    recipe = _recipe([(str(path), {"name": path.stem}), *_layers(path), *changes])
    values = dict(map(key_and_text, overrides))
    if "name" in values:
        return recipe
    return replace(recipe, name=file_name("-".join([recipe.name, *_changes(values)])))


def file_name(name: str) -> str:
    """``name``, or of one that is too long for a file as much as fits and a hash of it all."""
    whole = name.encode(errors="replace")
    if len(whole) <= NAME_BYTES:
        return name
    return f"{whole[: NAME_BYTES - 9].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"


def load_resolved(path: str | Path) -> Recipe:
    """Reads the ``recipe.yaml`` of a run folder back; raises RecipeError as `load_recipe` does."""
    return _recipe([(str(path), _values(Path(path)))])


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, after its format; `load_resolved` reads it back."""
    return f"format: {FORMAT}\n" + OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The file's own values and those of its bases, outermost base first."""
    if path.resolve() in above:
        raise RecipeError(f"{path}: base: names a file that leads back to itself; remove one `base:`")
    values = _values(path)
    base = values.pop("base", None)
    below = _layers(path.parent / str(base), (*above, path.resolve())) if base else []
    return [*below, (str(path), values)]


def _values(path: Path) -> dict[str, Any]:
    """The values of one file, after its format is checked."""
    values = typed(read(path), Recipe)
    check_format(values.pop("format", FORMAT), path)
    return values


def _recipe(layers: Sequence[tuple[str, dict[str, Any]]]) -> Recipe:
    """The recipe of layers, each with its source, the later over the earlier.

    They are merged at once, which is fast, or else key by key, so that every error can say which key it is about.
    """
    for source, layer in layers:
        refuse_text(layer, source)
    try:
        merged = OmegaConf.merge(SCHEMA, *(layer for _, layer in layers))
    except (OmegaConfBaseException, TypeError):  # the latter for a mapping where a list belongs
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
        raise RecipeError(f"{source}: {str(error).splitlines()[0]}") from error


def _with_key(merged: Any, key: str, value: Any, source: str) -> Any:
    section, _, leaf = key.partition(".")
    try:
        return OmegaConf.merge(merged, {section: {leaf: value} if leaf else value})
    except ConfigKeyError as error:
        if _nearest(key) == key:  # the fault is in the value, which has keys of its own
            raise RecipeError(f"{source}: {key}={value!r}: {str(error).splitlines()[0]}") from error
        raise RecipeError(f"{source}: unknown key {key!r}; the nearest is {_nearest(key)!r}") from error
    except (OmegaConfBaseException, TypeError) as error:
        raise RecipeError(f"{source}: {key}={value!r}: {str(error).splitlines()[0]}") from error


def _nearest(key: str) -> str:
    """The valid key whose last part, and then whole, is most like ``key``."""

    def likeness(name: str) -> float:
        parts = (name.rpartition(".")[2], key.rpartition(".")[2]), (name, key)
        return sum(difflib.SequenceMatcher(None, a, b).ratio() for a, b in parts)

    return max((name for name, _ in leaves(OmegaConf.to_container(SCHEMA))), key=likeness)


def _changes(values: dict[str, str]) -> list[str]:
    """What overrides change in a run, for its name: model.ratio=1/8 is ratio-1-8."""
    said = (*STRATEGY_KEYS, *TEXT_KEYS)
    named = {key: value for key, value in values.items() if key.startswith(said) or not key.startswith(FREE_KEYS)}
    return [re.sub(r"[^\w.]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-") for key, value in named.items()]
