"""What all request bodies share: strict types, and a word about every field that is not understood.

A field is known (a model attribute), meaningless here but harmless (`MEANINGLESS`: OpenAI's own bookkeeping), refused by name
(`REFUSED`: understood, but not served, so silence would give a wrong answer), or unknown.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from quire.errors import InvalidRequest, did_you_mean
from quire.log import logger
from quire.server.schema.wording import field_message

log = logger(__name__)

MEANINGLESS = frozenset(
    {
        "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "verbosity", "session_id", "stream_interval", "include_reasoning",
    }
)  # fmt: skip

_STRUCTURED = "constrained output is not served yet"
_MEDIA = "the model reads text only"
REFUSED: dict[str, str] = {
    "structured_outputs": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "guided_decoding_backend": _STRUCTURED,
    "guided_whitespace_pattern": _STRUCTURED,
    "structural_tag": _STRUCTURED,
    "media_io_kwargs": _MEDIA,
    "mm_processor_kwargs": _MEDIA,
    "prompt_embeds": "prompts are text or token ids",
    "documents": "put documents into the messages",
    "chat_template": "the template is chosen when the server is started (--chat-template)",
    "logits_processors": "code from requests is not run",
    "logprob_token_ids": "ask for top_logprobs or logprobs",
    "kv_transfer_params": "there is no KV transfer",
    "vllm_xargs": "there are no extra arguments",
    "repetition_detection": "use repetition_penalty or frequency_penalty",
    "thinking_token_budget": "there is no reasoning parser",
    "reasoning_effort": "there is no reasoning parser",
    "return_prompt_text": "use echo or /detokenize",
}

HARMLESS: dict[str, Any] = {
    "suffix": "",
    "reasoning_effort": "none",
    "media_io_kwargs": {},
    "mm_processor_kwargs": {},
    "vllm_xargs": {},
}
"""Values of refused fields that ask for nothing; some clients always send them."""


class RequestBody(BaseModel):
    """A JSON object with known fields; null means "not said" everywhere."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    refused: ClassVar[dict[str, str]] = REFUSED
    """Fields of this body that are refused by name, with the reason."""

    @classmethod
    def read(cls, data: dict[str, Any], unknown: str) -> Self:
        """Check `data`; `unknown` says what becomes of unknown fields: error, warn or ignore."""
        cls._check_names(data, unknown)
        try:
            return cls.model_validate({name: value for name, value in data.items() if value is not None})
        except ValidationError as error:
            message, field = field_message(error)
            raise InvalidRequest(message, parameter=field) from None

    @classmethod
    def _check_names(cls, data: dict[str, Any], unknown: str) -> None:
        for name, value in data.items():
            if name in cls.model_fields or name in MEANINGLESS or value is None:
                continue
            if name in cls.refused:
                if name in HARMLESS and value == HARMLESS[name]:
                    continue
                raise InvalidRequest(f"{name} is not supported: {cls.refused[name]}.", parameter=name)
            if unknown == "ignore":
                continue
            shown = name[:100]
            message = f"unknown field {shown!r}.{did_you_mean(shown, cls.model_fields)}"
            if unknown == "error":
                raise InvalidRequest(message, parameter=shown)
            log.warning("%s It has no effect.", message)
