"""Texts to calibrate and to judge with: a file of the user's, or the docstrings of Python's standard library.

Text only; tokens are made by a function that is handed in.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

Rows = list[list[int]]
# What becomes one text of a conversation's messages.
Rendered = Callable[[list[dict[str, Any]]], str]
# Every so many rows one is held out.
HELD_OUT_EVERY = 5


def _contents(messages: list[dict[str, Any]]) -> str:
    return "\n".join(message["content"] for message in messages)


def texts_of(path: Path | None, rendered: Rendered = _contents) -> Iterator[str]:
    """Texts of a .jsonl file (field "text", or "messages" as `rendered`), of a .txt file, or built in. Raises ConfigError."""
    if path is None:
        return built_in()
    if path.suffix not in (".jsonl", ".txt"):
        raise ConfigError(f"data must be a .jsonl or .txt file, got {str(path)!r}.")
    try:
        whole = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data {str(path)!r} cannot be read: {error}.") from None
    return iter([whole]) if path.suffix == ".txt" else _json_texts(path, whole, rendered)


def _json_texts(path: Path, whole: str, rendered: Rendered) -> Iterator[str]:
    for number, line in enumerate(whole.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text = entry["text"] if "text" in entry else rendered(entry["messages"])
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ConfigError(f'data {path.name!r}, line {number}: must be an object with "text" or "messages".')
        yield text


def built_in() -> Iterator[str]:
    """Docstrings of the standard library's own modules, in the order of their names: the same wherever Python is the same."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        documented = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield "\n\n".join(text for text in documented if text)


def rows_of(
    texts: Iterator[str], encode: Callable[[str], list[int]], length: int, count: int, held_out: int
) -> tuple[Rows, Rows]:
    """(`count` rows to calibrate with, `held_out` others), each of `length` tokens, spread evenly over the texts.

    Fewer where the texts are too short for as many; raises ConfigError where they are too short for two.
    """
    tokens = [token for text in texts if text for token in encode(text)]
    rows = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    if len(rows) < 2:
        raise ConfigError(f"data must have at least {2 * length} tokens, got {len(tokens)}.")
    every = min(HELD_OUT_EVERY, len(rows))
    held = [row for number, row in enumerate(rows) if number % every == every - 1]
    kept = [row for number, row in enumerate(rows) if number % every != every - 1]
    return _spread(kept, count), _spread(held, held_out)


def _spread(rows: Rows, count: int) -> Rows:
    return rows if len(rows) <= count else [rows[number * len(rows) // count] for number in range(count)]
