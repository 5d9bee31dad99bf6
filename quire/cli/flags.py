"""Flags generated from a dataclass of options: its fields are the one table, their docstrings the help.

A new field of EngineConfig or ServerOptions is a flag at once. Knows the types that those classes use, not their meaning;
values are checked by the classes themselves.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import click

from quire.cli.command import SectionedOption
from quire.errors import ConfigError

SHORT = {"tensor_parallel_size": "-tp", "pipeline_parallel_size": "-pp", "quantization": "-q"}
_SCALES = {
    **{"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12},
    **{"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
_NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*([a-zA-Z]*)")


def human_integer(text: str) -> int:
    """A whole number for people, as vLLM reads it: 1k is 1000, 1K is 1024, 2M is 2 * 2**20, 25.6k is 25600."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or (match[2] and match[2] not in _SCALES):
        raise ValueError(text)
    if not match[2]:
        return int(match[1])
    return int(float(match[1]) * _SCALES[match[2]]) if "." in match[1] else int(match[1]) * _SCALES[match[2]]


class HumanInteger(click.ParamType):
    """A whole number, also as 4k or 2M; with `words`, one of those."""

    def __init__(self, words: tuple[str, ...] = ()) -> None:
        self.words = words
        self.name = "|".join(["integer", *words])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int) or value in self.words:
            return value
        try:
            return human_integer(value)
        except ValueError:
            also = f" or {', '.join(self.words)}" if self.words else ""
            self.fail(f"must be a whole number such as 4096, 4k (4000) or 4K (4096){also}, got {value!r}.", param, ctx)


class JsonObject(click.ParamType):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            return value
        try:
            read = json.loads(value)
        except json.JSONDecodeError as error:
            self.fail(f"must be a JSON object, got {value!r} ({error}).", param, ctx)
        if not isinstance(read, dict):
            self.fail(f"must be a JSON object, got {value!r}.", param, ctx)
        return read


_TYPES: dict[str, Any] = {
    "str": str,
    "int": HumanInteger(),
    "float": float,
    "int | str": HumanInteger(("auto",)),
    "Mapping[str, Any]": JsonObject(),
}


def options_of(kind: type, section: str, *, skip: Iterable[str] = ()) -> list[click.Option]:
    """One click option for every field of a dataclass. What is not given stays None, so that its source can be told."""
    help_of = field_docs(kind)
    return [_option(f, help_of[f.name], section) for f in fields(kind) if f.name not in set(skip)]


def with_options(options: list[click.Option]) -> Callable[[click.Command], click.Command]:
    """Decorate a command with ready options."""

    def add(command: click.Command) -> click.Command:
        command.params.extend(options)
        return command

    return add


def given(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that belong to `kind` and were given on the command line."""
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in values.items() if name in names and value is not None and value != ()}


def build(kind: type, values: Mapping[str, Any]) -> Any:
    """The checked dataclass from the flags that were given; errors name the flag instead of the field."""
    try:
        return kind(**given(kind, values))
    except ConfigError as error:
        first, _, rest = str(error).partition(" ")
        is_field = first in {f.name for f in fields(kind)}
        raise type(error)(f"{flag_name(first)} {rest}" if is_field else str(error)) from None


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a class; Python does not keep them, so they are read from the source."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for statement, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(after, ast.Expr), f"{kind.__name__}.{statement.target.id} has no docstring"
            assert isinstance(after.value, ast.Constant)
            docs[statement.target.id] = " ".join(str(after.value.value).split())
    return docs


def _option(field: Field[Any], help_text: str, section: str) -> click.Option:
    name, kind = flag_name(field.name), str(field.type).replace(" | None", "")
    default = field.default if field.default is not MISSING else None
    if default not in (None, "", ()) and kind != "bool":
        help_text += f" [default: {default}]"
    names = [name, field.name] + ([SHORT[field.name]] if field.name in SHORT else [])
    if kind == "bool":
        names = [f"{name}/{name.replace('--', '--no-', 1)}", field.name]
        help_text += f" [default: {'on' if default else 'off'}]"
        return SectionedOption(names, default=None, help=help_text, section=section)
    if kind == "tuple[str, ...]":
        help_text += " May be given several times."
        return SectionedOption(names, multiple=True, help=help_text, section=section)
    return SectionedOption(names, type=_TYPES[kind], default=None, help=help_text, section=section)
