"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from quire.errors import InvalidRequest
from quire.server.schema.base import REFUSED
from quire.server.schema.sampling import SamplingBody
from quire.service.requests import TextRequest

DEFAULT_MAX_TOKENS = 16
_FORMS = "a string, a list of strings, a list of token ids or a list of lists of token ids"


class CompletionBody(SamplingBody):
    """Text to continue."""

    prompt: str | list[Any]
    max_tokens: int | None = None
    logprobs: int | None = None

    refused: ClassVar[dict[str, str]] = {**REFUSED, "suffix": "the model cannot fill in the middle"}

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        if isinstance(value, str) or _is_ids(value):
            return value
        if isinstance(value, list) and value and (all(type(item) is str for item in value) or all(map(_is_ids, value))):
            return value
        raise PydanticCustomError("prompt_form", "{forms}, not empty", {"forms": _FORMS})

    def prompts(self) -> tuple[str | list[int], ...]:
        """Every prompt on its own."""
        return (self.prompt,) if isinstance(self.prompt, str) or _is_ids(self.prompt) else tuple(self.prompt)

    def to_request(self, request_id: str) -> TextRequest:
        """The request in the application's words."""
        self.check()
        echo_only = self.echo and self.max_tokens == 0
        if self.logprobs is not None and self.logprobs < 0 and self.logprobs != -1:
            raise InvalidRequest(
                f"logprobs must be non-negative or -1, got {self.logprobs}.", parameter="logprobs", value=self.logprobs
            )
        sampling = self.sampling()
        if self.max_tokens is not None and not echo_only:
            sampling["max_tokens"] = self.max_tokens
        if self.logprobs is not None:
            sampling["logprobs"] = self.logprobs
            if self.echo and self.prompt_logprobs is None:
                sampling["prompt_logprobs"] = self.logprobs
        return TextRequest(
            request_id=request_id,
            prompts=self.prompts(),
            sampling=sampling,
            preset=self.preset,
            n=self.n,
            best_of=self.best_of,
            max_tokens_default=DEFAULT_MAX_TOKENS,
            echo=self.echo,
            echo_only=echo_only,
            use_beam_search=self.use_beam_search,
            length_penalty=self.length_penalty,
            priority=self.priority,
            cache_salt=self.cache_salt or "",
            add_special_tokens=self.add_special_tokens is not False,
        )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
