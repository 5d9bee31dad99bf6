"""The checked form of `speculative_config`: how tokens are drafted ahead of the model. Names and their meaning are vLLM's.

A contract like `request.py`: the options are checked against it, the scheduler drafts by it. Knows no sequence and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.errors import ConfigError, did_you_mean

METHODS = ("ngram",)
KEYS = ("method", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max")
MOST_TOKENS, LONGEST_MATCH = 16, 32
DEFAULT_MIN, DEFAULT_MAX = 2, 5
MOST_ROWS = 32
NAME = "speculative_config"


@dataclass(frozen=True)
class Speculation:
    """Drafts are what followed the latest earlier occurrence of a sequence's last tokens (n-gram, or prompt lookup).

    num_speculative_tokens: most tokens of one draft. prompt_lookup_min, prompt_lookup_max: so many last tokens must have
    occurred before; the longer match wins. most_rows: with its drafts a step has no more rows than this; in a larger
    one, time goes into the rows, and drafts would take it from others (docs/decisions/0007-speculation.md).
    """

    num_speculative_tokens: int
    prompt_lookup_min: int = DEFAULT_MIN
    prompt_lookup_max: int = DEFAULT_MAX
    most_rows: int = MOST_ROWS

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Speculation | None:
        """From the user's options, None for none. Raises ConfigError naming key, range and value."""
        if options is None:
            return None
        if not isinstance(options, Mapping):
            raise ConfigError(f"{NAME} must be a mapping (on the command line a JSON object), got {options!r}.")
        for key in options:
            if key not in KEYS:
                hint = did_you_mean(str(key), KEYS)
                raise ConfigError(f"{NAME} has an unknown key {key!r}; it knows {', '.join(KEYS)}.{hint}")
        method = options.get("method")
        if method not in METHODS:
            raise ConfigError(
                f"{NAME} method must be {METHODS[0]} (text that repeats itself; there is no second model), got {method!r}."
            )
        tokens = _whole(options, "num_speculative_tokens", 1, MOST_TOKENS)
        if tokens is None:
            raise ConfigError(f"{NAME} needs num_speculative_tokens, a whole number in [1, {MOST_TOKENS}].")
        low = _whole(options, "prompt_lookup_min", 1, LONGEST_MATCH)
        high = _whole(options, "prompt_lookup_max", 1, LONGEST_MATCH)
        # As at vLLM, one of them alone stands for both.
        shortest = low or high or DEFAULT_MIN
        longest = high or low or DEFAULT_MAX
        if shortest > longest:
            raise ConfigError(f"{NAME} prompt_lookup_min must be at most prompt_lookup_max={longest}, got {shortest}.")
        return cls(tokens, shortest, longest)


def _whole(options: Mapping[str, Any], key: str, low: int, high: int) -> int | None:
    value = options.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{NAME} {key} must be a whole number in [{low}, {high}], got {value!r}.")
    return value
