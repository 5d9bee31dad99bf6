"""One client request and its results as plain values: what every door turns its own dialect into and out of.

Knows no engine and no HTTP. `SamplingParams` is not built here, as its defaults depend on preset, flags and model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.request import LogprobsOfToken


@dataclass(frozen=True)
class TextRequest:
    """A request that is right in form. Exactly one of `prompts` and `messages` is given.

    sampling: only what the client named, under SamplingParams' names; the rest comes from preset, flag and model.
    field_names: the client's own name of a parameter where it differs, so that errors name what was sent.
    """

    request_id: str
    prompts: tuple[str | list[int], ...] = ()
    messages: list[dict[str, Any]] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    n: int = 1
    best_of: int | None = None
    max_tokens_default: int | None = None
    echo: bool = False
    echo_only: bool = False
    use_beam_search: bool = False
    length_penalty: float = 1.0
    priority: int = 0
    cache_salt: str = ""
    adapter: str | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    field_names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log-probability; `top` holds the likeliest alternatives, best first."""

    token_id: int
    token: str
    bytes: tuple[int, ...]
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass
class Usage:
    """Tokens of a whole request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Piece:
    """What is new of one choice. `opening` is the echoed prompt and comes, if at all, with the first piece."""

    index: int
    prompt_index: int
    text: str
    token_ids: Sequence[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    first: bool = False
    opening: str = ""
    opening_logprobs: list[TokenLogprob] | None = None
    prompt_token_ids: Sequence[int] | None = None


@dataclass
class Choice:
    """One finished answer."""

    index: int
    prompt_index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    stop_reason: str | int | None


@dataclass
class PromptResult:
    """What is told of a prompt itself."""

    token_ids: list[int]
    prompt_logprobs: list[LogprobsOfToken | None] | None = None


@dataclass
class Result:
    """All choices in prompt-major order."""

    choices: list[Choice]
    prompts: list[PromptResult]
    usage: Usage
