"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any, ClassVar

from quire.errors import InvalidRequest
from quire.server.schema.base import REFUSED
from quire.server.schema.messages import plain_messages
from quire.server.schema.sampling import SamplingBody
from quire.service.requests import TextRequest

_TOOLS = "tool calls are not served yet"


class ChatBody(SamplingBody):
    """A conversation to continue."""

    messages: list[Any]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None

    refused: ClassVar[dict[str, str]] = {
        **REFUSED,
        "functions": _TOOLS,
        "function_call": _TOOLS,
        "audio": "the model speaks text only",
        "prediction": "predicted outputs are not served",
        "web_search_options": "there is no web search",
    }

    def to_request(self, request_id: str) -> TextRequest:
        """The request in the application's words."""
        self.check()
        self._check_chat()
        sampling, names = self.sampling(), {}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit is not None:
            sampling["max_tokens"] = limit
        if self.logprobs:
            sampling["logprobs"] = self.top_logprobs or 0
            names["logprobs"] = "top_logprobs"
        return TextRequest(
            request_id=request_id,
            messages=plain_messages(self.messages),
            sampling=sampling,
            preset=self.preset,
            n=self.n,
            best_of=self.best_of,
            echo=self.echo,
            use_beam_search=self.use_beam_search,
            length_penalty=self.length_penalty,
            priority=self.priority,
            cache_salt=self.cache_salt or "",
            add_special_tokens=bool(self.add_special_tokens),
            add_generation_prompt=generation_prompt(self.add_generation_prompt, self.continue_final_message),
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
            field_names=names,
        )

    def _check_chat(self) -> None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("when using `top_logprobs`, `logprobs` must be set to true.", parameter="top_logprobs")
        if self.top_logprobs is not None and self.top_logprobs < -1:
            raise InvalidRequest(
                f"top_logprobs must be non-negative or -1, got {self.top_logprobs}.",
                parameter="top_logprobs",
                value=self.top_logprobs,
            )
        if self.tools is not None:
            reason = _TOOLS if self.tools else "an empty list has no meaning, leave it out"
            raise InvalidRequest(f"tools is not supported: {reason}.", parameter="tools")
        if self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequest(f"tool_choice is not supported: {_TOOLS}.", parameter="tool_choice")
        if self.modalities is not None and self.modalities != ["text"]:
            raise InvalidRequest("modalities must be ['text'].", parameter="modalities", value=self.modalities)
        final = self.messages[-1] if self.messages else None
        if self.continue_final_message and (not isinstance(final, dict) or final.get("role") != "assistant"):
            raise InvalidRequest(
                "continue_final_message needs a final message of role 'assistant'.", parameter="continue_final_message"
            )


def generation_prompt(named: bool | None, continue_final_message: bool) -> bool:
    """Whether the template opens a new answer: it does unless the last message is continued."""
    if named and continue_final_message:
        raise InvalidRequest(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            parameter="continue_final_message",
        )
    return named if named is not None else not continue_final_message
