"""pydantic's findings in plain words: one sentence a field, with what was wanted and what came; never more than ten."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

MAX_FIELD_ERRORS = 10

_WANTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def field_message(error: ValidationError) -> tuple[str, str | None]:
    """(message, first field) of pydantic's findings: one sentence a field, alternatives joined, at most ten fields."""
    fields: dict[str, tuple[list[str], Any]] = {}
    for found in error.errors(include_url=False, include_context=True):
        # Branches of a union appear as extra steps of the location; a field is a name and perhaps an index.
        steps = [str(step) for step in found["loc"]]
        name = ".".join(step for step in steps if re.fullmatch(r"[a-z_]+|\d+", step) and step not in _BRANCHES)
        fields.setdefault(name, ([], found["input"]))[0].append(_wanted(found))
    lines = [_sentence(name, wanted, value) for name, (wanted, value) in list(fields.items())[:MAX_FIELD_ERRORS]]
    if len(fields) > MAX_FIELD_ERRORS:
        lines.append(f"and {len(fields) - MAX_FIELD_ERRORS} more.")
    return " ".join(lines), next(iter(fields), None) or None


_BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})


def _wanted(found: Any) -> str:
    if found["type"] == "missing":
        return "required"
    if found["type"] == "literal_error":
        return "one of " + found["ctx"]["expected"]
    return _WANTED.get(found["type"], found["msg"][:1].lower() + found["msg"][1:])


def _sentence(name: str, wanted: list[str], value: Any) -> str:
    name = name or "the body"
    if wanted == ["required"]:
        return f"{name} is required."
    shown = repr(value)
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    return f"{name} must be {' or '.join(dict.fromkeys(wanted))}, got {shown}."
