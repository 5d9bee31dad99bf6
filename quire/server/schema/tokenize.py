"""The bodies of POST /tokenize and POST /detokenize."""

from __future__ import annotations

from typing import Any, ClassVar

from quire.errors import InvalidRequest
from quire.server.schema.base import REFUSED, RequestBody
from quire.server.schema.chat import generation_prompt
from quire.server.schema.messages import plain_messages
from quire.service.requests import TextRequest


class TokenizeBody(RequestBody):
    """A prompt, or messages to render first."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    refused: ClassVar[dict[str, str]] = {**REFUSED, "tools": "tool calls are not served yet"}

    def to_request(self, request_id: str) -> TextRequest:
        """The request in the application's words."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give exactly one of prompt and messages.", parameter="prompt")
        if self.prompt is not None:
            return TextRequest(request_id, prompts=(self.prompt,), add_special_tokens=self.add_special_tokens is not False)
        return TextRequest(
            request_id,
            messages=plain_messages(self.messages or []),
            add_special_tokens=bool(self.add_special_tokens),
            add_generation_prompt=generation_prompt(self.add_generation_prompt, self.continue_final_message),
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class DetokenizeBody(RequestBody):
    """Token ids."""

    model: str | None = None
    tokens: list[int]
