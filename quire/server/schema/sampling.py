"""The fields that completions and chat completions share. Only types are checked here: the ranges are SamplingParams'."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from quire.errors import InvalidRequest
from quire.server.schema.base import RequestBody

MAX_PRIORITY = 2**31 - 1
MAX_SALT = 256
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

_PASSED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "prompt_logprobs",
)


class StreamOptions(BaseModel):
    """How a stream reports its usage."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(RequestBody):
    """A request for generated text."""

    model: str | None = None
    n: int = 1
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left"] | None = None
    prompt_logprobs: int | None = None
    use_beam_search: bool = False
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None
    preset: str | None = None
    echo: bool = False
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool = False
    response_format: dict[str, Any] | None = None

    def check(self) -> None:
        """Rules between fields that hold for every kind of generation."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("Stream options can only be defined when `stream=True`.", parameter="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("`prompt_logprobs` are not available when `stream=True`.", parameter="prompt_logprobs")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise InvalidRequest(
                "response_format.type must be 'text': constrained output is not served yet.",
                parameter="response_format",
                value=self.response_format.get("type"),
            )
        if self.request_id is not None and not _REQUEST_ID.fullmatch(self.request_id):
            raise InvalidRequest(
                "request_id must have 1 to 128 letters, digits or any of _.:-", parameter="request_id", value=self.request_id
            )
        if abs(self.priority) > MAX_PRIORITY:
            raise InvalidRequest(
                f"priority must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], got {self.priority}.", parameter="priority"
            )
        if self.cache_salt is not None and not 1 <= len(self.cache_salt) <= MAX_SALT:
            raise InvalidRequest(
                f"cache_salt must have 1 to {MAX_SALT} characters, got {len(self.cache_salt)}.", parameter="cache_salt"
            )
        for name, value in (("n", self.n), ("best_of", self.best_of)):
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} must be at least 1, got {value}.", parameter=name, value=value)

    def sampling(self) -> dict[str, Any]:
        """What the client named, under SamplingParams' names."""
        return {name: value for name in _PASSED if (value := getattr(self, name)) is not None}

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        return self.wants_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats
