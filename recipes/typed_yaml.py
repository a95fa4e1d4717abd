"""Read YAML files and ``key=value`` arguments by the types of a schema of dataclasses.

A key of type string takes the text unchanged: 0010, 3:1 and 1e5 stay the same. Numbers are decimal. A value in
quotes, also in an argument, is the text between the quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import reduce
from pathlib import Path
from types import FunctionType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from recipes.config import RecipeError

NULL = "tag:yaml.org,2002:null"


class Written:
    """Mark a kind of value that stays as a user would type it behind ``key=``: lists and mappings become JSON."""


class _Loader(yaml.SafeLoader):
    """Load YAML with null, booleans and decimal numbers: no octal 010, no sexagesimal 3:1, no alias *.txt."""

    yaml_implicit_resolvers = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "a name that begins with *", self.peek_event().start_mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", "N", ""]),
    ("bool", r"true|false|yes|no|on|off", list("tTfFyYnNoO")),
    ("int", r"[-+]?(0|[1-9][0-9]{0,99})", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=e))(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z", re.IGNORECASE), _first)


def read(path: Path) -> yaml.MappingNode:
    """Read the YAML of a file, for `typed`; raise RecipeError for anything but ``key: value`` lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path}: cannot be read ({error}); give the path of a recipe, such as recipes/quickstart.yaml"
        ) from error
    try:
        node = _parse(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{path}: not valid YAML: {_said(error)}; a value with * & [ {{ : # and the like goes between quotes"
        ) from error
    if node.tag == NULL and not node.value:
        return yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}: must hold `key: value` lines")
    return node


def key_and_text(argument: str) -> tuple[str, str]:
    """Split a ``key=value`` argument into its two sides."""
    key, equals, text = argument.partition("=")
    if not key or not equals:
        raise RecipeError(f"argument {argument!r} is not of the form key=value, such as train.steps=20")
    if not text:
        raise RecipeError(f"argument {argument!r} has nothing behind the =; leave it out, or write {key}=null for none")
    return key, text


def override(argument: str, schema: type) -> dict[str, Any]:
    """Read a ``key=value`` argument by the schema and nest the value under its key: {train: {steps: 20}}."""
    key, text = key_and_text(argument)
    names = key.split(".")
    kind = reduce(_inside, names, schema)
    _, bare = _optional(kind)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if (bare in (str, int, float, bool) or get_origin(bare) is Literal) and not quoted:
        node: yaml.Node = yaml.ScalarNode(_Loader("").resolve(yaml.ScalarNode, text, (True, False)), text)
    else:
        try:
            node = _parse(text)
        except yaml.YAMLError as error:
            raise RecipeError(
                f"argument {argument!r} is not valid YAML: {_said(error)}; a list is [a, b], a mapping {{a: 1}}, and "
                f"other text goes between quotes: {key}='\"{text}\"'"
            ) from error
    return reduce(lambda value, name: {name: value}, reversed(names), typed(node, kind))


def typed(node: yaml.Node, kind: Any) -> Any:
    """Return the value of a YAML node as a ``kind``: a type, a dataclass, or Any for YAML's own meaning.

    The caller checks values that do not fit. For a mapping with a vague type, the field's metadata may hold ``kind``,
    a function from keys to kinds.
    """
    optional, kind = _optional(kind)
    if kind is Written:
        return (node.value or "null") if isinstance(node, yaml.ScalarNode) else json.dumps(typed(node, Any))
    if isinstance(node, yaml.MappingNode):
        return {key.value: typed(value, _inside(kind, key.value)) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [typed(value, _inside(kind, "")) for value in node.value]
    if kind is str and (node.tag != NULL or (node.value and not optional)):
        return node.value
    meaning = _Loader("").construct_object(node)
    if kind in (int, float) and meaning is not None:
        with suppress(ValueError):
            return kind(node.value)
    return meaning


def refuse_text(values: Any, source: str) -> None:
    """Raise RecipeError for text with a meaning in OmegaConf, and for text that is not UTF-8.

    A recipe that reads the environment could carry a secret into the run folder and from there into a report.
    """
    if isinstance(values, str):
        if "${" in values:
            raise RecipeError(
                f"{source}: {values!r} holds ${{...}}, which is not resolved here, for secrets must not reach a run "
                "folder; write the value itself"
            )
        if values.lstrip("\\") == "???":
            raise RecipeError(f"{source}: {values!r} stands for a missing value; write the value itself")
        if values.encode(errors="ignore").decode() != values:
            raise RecipeError(
                f"{source}: {values!r} is not UTF-8; rename the file, or name a folder or a glob above it"
            )
    if isinstance(values, Mapping):
        values = [*values.keys(), *values.values()]
    for value in values if isinstance(values, list) else ():
        refuse_text(value, source)


def _parse(text: str) -> yaml.Node:
    node = yaml.compose(text, Loader=_Loader) or yaml.ScalarNode(NULL, "")
    _check(node)
    return node


def _check(node: yaml.Node) -> None:
    """Raise YAMLError for a key that is no word or that occurs twice, and for a value of no known type."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                problem = "a key that is no word" if not isinstance(key, yaml.ScalarNode) else f"{key.value} again"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            seen.add(key.value)
            _check(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check(value)
    else:
        _Loader("").construct_object(node)


def _said(error: yaml.YAMLError) -> str:
    """Shorten a YAML error to one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())


def _optional(kind: Any) -> tuple[bool, Any]:
    """Tell whether a kind is ``X | None``, and return X."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    rest = [member for member in members if member is not type(None)]
    return len(rest) < len(members), rest[0] if len(rest) == 1 else Any if rest else kind


def _inside(kind: Any, key: str) -> Any:
    """Return the kind of the value under ``key`` in a ``kind``; str for a key that a dataclass lacks."""
    _, kind = _optional(kind)
    if isinstance(kind, FunctionType):
        return kind(key)
    if is_dataclass(kind):
        by_name = {field.name: field for field in fields(kind)}
        return by_name[key].metadata.get("kind") or get_type_hints(kind)[key] if key in by_name else str
    arguments = get_args(kind)
    if get_origin(kind) in (list, tuple, dict) and arguments:
        return arguments[-1]
    return Any
