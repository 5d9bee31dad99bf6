"""The sampling flags of `generate`, `chat` and `presets explain`: one table, also behind the REPL's `/set`.

Ranges are SamplingParams' own business; this table knows names, types and one line of help.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import click

from quire.cli.command import SectionedOption
from quire.cli.flags import HumanInteger, JsonObject, flag_name
from quire.errors import InvalidRequest, did_you_mean
from quire.request import SamplingParams

WHOLE, REAL, WORDS, IDS, SWITCH, OBJECT = "whole number", "number", "texts", "token ids", "on or off", "JSON object"
SAMPLING: dict[str, tuple[str, str]] = {
    "temperature": (REAL, "Randomness in [0, 2]; 0 takes the likeliest token."),
    "top_p": (REAL, "Draw from the likeliest tokens that hold this share of probability, in (0, 1]."),
    "top_k": (WHOLE, "Draw from so many likeliest tokens; 0 is all."),
    "min_p": (REAL, "Drop tokens below this share of the likeliest one's probability, in [0, 1]."),
    "repetition_penalty": (REAL, "Above 1 makes tokens of prompt and answer less likely."),
    "presence_penalty": (REAL, "Taken from the logit of every token that the answer has, in [-2, 2]."),
    "frequency_penalty": (REAL, "The same for each time the token occurred, in [-2, 2]."),
    "seed": (WHOLE, "The same seed gives the same answer."),
    "max_tokens": (WHOLE, "Most tokens of the answer."),
    "min_tokens": (WHOLE, "Tokens before the answer may end."),
    "stop": (WORDS, "Text that ends the answer."),
    "stop_token_ids": (IDS, "Token that ends the answer."),
    "ignore_eos": (SWITCH, "Go on after the end-of-sequence token."),
    "logit_bias": (OBJECT, 'Added to logits: {"token id": number}.'),
    "bad_words": (WORDS, "Text that must not be written."),
}
_TYPES: dict[str, Any] = {WHOLE: HumanInteger(), REAL: float, WORDS: str, IDS: int, OBJECT: JsonObject()}
_MANY = (WORDS, IDS)


def sampling_options() -> list[click.Option]:
    """One click option for every row of the table; what is not given stays None."""
    options: list[click.Option] = []
    for name, (kind, text) in SAMPLING.items():
        flag = flag_name(name)
        if kind == SWITCH:
            names = [f"{flag}/{flag.replace('--', '--no-', 1)}", name]
            options.append(SectionedOption(names, default=None, help=text, section="Sampling"))
        elif kind in _MANY:
            help_text = text + " May be given several times."
            options.append(SectionedOption([flag, name], type=_TYPES[kind], multiple=True, help=help_text, section="Sampling"))
        else:
            options.append(SectionedOption([flag, name], type=_TYPES[kind], default=None, help=text, section="Sampling"))
    return options


def given_sampling(values: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling values that were given out of a command's values."""
    found = {name: values.pop(name) for name in SAMPLING if name in values}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items() if v is not None and v != ()}


def parse(name: str, text: str) -> Any:
    """The value of a sampling parameter from text, as `/set NAME VALUE` gives it. Raises InvalidRequest."""
    plain = name.lower().replace("-", "_")
    if plain not in SAMPLING:
        hint = did_you_mean(plain, SAMPLING)
        raise InvalidRequest(f"no sampling parameter {name!r}.{hint} Known: {', '.join(SAMPLING)}.")
    kind = SAMPLING[plain][0]
    try:
        if kind == SWITCH:
            return {"on": True, "true": True, "off": False, "false": False}[text.lower()]
        if kind in _MANY:
            return json.loads(text) if text.startswith("[") else [int(text) if kind == IDS else text]
        return _TYPES[kind].convert(text, None, None) if kind != REAL else float(text)
    except (ValueError, KeyError, click.BadParameter):
        raise InvalidRequest(f"{plain} must be {kind}, got {text!r}.") from None


def sampling_defaults() -> dict[str, Any]:
    """SamplingParams' own defaults for the names of the table."""
    defaults = {f.name: f.default for f in fields(SamplingParams)}
    return {name: defaults[name] for name in SAMPLING}


def check(values: Mapping[str, Any]) -> None:
    """Raise InvalidRequest if a value is out of range. Without max_tokens an answer may be as long as fits."""
    SamplingParams(**{"max_tokens": None, **values})
