"""Prompts to measure with: random ones of given lengths, or those of a file. Knows no engine and no server."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from quire.errors import ConfigError

# Every tokenizer has these ids, and none of the usual tokens that end a text is among them.
LOWEST_ID, HIGHEST_ID = 10, 250
_LETTERS = "etaoinshrdlucmfwypvbgk"


@dataclass(frozen=True)
class Asked:
    """One request: token ids or text, and how many tokens are to come."""

    prompt: list[int] | str
    output: int


def random_requests(
    count: int, given: int, drawn: int, *, prefix: int = 0, spread: float = 0.0, seed: int = 0, text: bool = False
) -> list[Asked]:
    """Requests of `given` + `prefix` tokens in and `drawn` out, the first `prefix` tokens the same in all.

    spread: each length is drawn from [length * (1 - spread), length * (1 + spread)], whole and at least 1. text: words, about
    one for a token, for servers that take no ids.
    """
    if not 0 <= spread < 1:
        raise ConfigError(f"--random-range-ratio must be in [0, 1), got {spread:g}.")
    draw = random.Random(seed)
    head = _some(draw, prefix, text)
    requests = []
    for _ in range(count):
        length, output = _near(draw, given, spread), _near(draw, drawn, spread)
        words = head + _some(draw, length, text)
        requests.append(Asked(" ".join(map(str, words)) if text else [int(word) for word in words], output))
    return requests


def file_requests(path: Path, count: int, output: int, seed: int = 0) -> list[Asked]:
    """Requests from lines of JSON with "prompt" (text or token ids) and, if it is there, "output_tokens".

    Where the file has fewer lines than `count`, they come again.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset-path {path} cannot be read: {error}.") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(path, number, line, output))
    if not rows:
        raise ConfigError(f'--dataset-path {path} holds no prompts: each line is a JSON object such as {{"prompt": "..."}}.')
    random.Random(seed).shuffle(rows)
    return [rows[number % len(rows)] for number in range(count)]


def _row(path: Path, number: int, line: str, output: int) -> Asked:
    where = f"--dataset-path {path}, line {number}"
    try:
        row = json.loads(line)
        prompt, tokens = row["prompt"], row.get("output_tokens") or output
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(f'{where}: must be a JSON object with "prompt", got {line[:80]!r}.') from None
    is_ids = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
    if not is_ids and not (isinstance(prompt, str) and prompt):
        raise ConfigError(f'{where}: "prompt" must be text or token ids, not empty, got {str(prompt)[:80]!r}.')
    if type(tokens) is not int or tokens < 1:
        raise ConfigError(f'{where}: "output_tokens" must be a whole number of at least 1, got {tokens!r}.')
    return Asked(prompt, tokens)


def _near(draw: random.Random, length: int, spread: float) -> int:
    return max(1, draw.randint(round(length * (1 - spread)), round(length * (1 + spread)))) if spread else length


def _some(draw: random.Random, count: int, text: bool) -> list[int] | list[str]:
    if text:
        return ["".join(draw.choices(_LETTERS, k=draw.randint(2, 5))) for _ in range(count)]
    return [draw.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(count)]
