"""Messages to the text of a prompt: which template, what it may be told, and how messages are put in order for it.

The semantics are those of `transformers`' apply_chat_template. Message content is text or a list of text parts; keys that are
not known here are handed to the template, which may read them or not. How templates run is `sandbox`'s business. This file
knows no HTTP and no token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quire.errors import InvalidRequest, did_you_mean
from quire.text.sandbox import CompiledTemplate, compile_template

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer

_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_MAX_DEPTH = 64


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt for a conversation. InvalidRequest for everything that is wrong with it or with the template.

    chat_template: a template, or the name of one of the model's; None takes the model's own (`tool_use` when there are tools).
    continue_final_message: leave the last message open, so that the model goes on writing it.
    chat_template_kwargs: further variables, only such as the template reads.
    """
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt cannot both be true: the first goes on with the last message, "
            "the second begins a new one.",
            parameter="continue_final_message",
            value=True,
        )
    template = compile_template(pick_template(tokenizer.chat_template, chat_template, bool(tools)))
    extra = _read_extra(template, chat_template_kwargs or {}, tokenizer.special_tokens)
    ordered = normalise(messages, as_parts=template.reads_parts)
    given = {
        "messages": ordered,
        "tools": _read_objects(tools, "tools"),
        "documents": _read_objects(documents, "documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    input_size = len(template.source) + len(json.dumps([given, extra], ensure_ascii=False))
    final = _open_final_message(ordered, template) if continue_final_message else None
    text = template.run({**tokenizer.special_tokens, **extra, **given}, input_size=input_size)
    return text if final is None else _cut_final_message(text, final)


def pick_template(own: str | Mapping[str, str] | None, asked: str | None, with_tools: bool) -> str:
    """The template to use, of the model's `own` (one, or several by name) and the one that was `asked` for."""
    if isinstance(own, Mapping):
        if asked is not None:
            return own.get(asked, asked)
        for name in (["tool_use"] if with_tools else []) + ["default"]:
            if name in own:
                return own[name]
        raise InvalidRequest(
            f"this model has several chat templates and no default one; chat_template must name one of {sorted(own)}.",
            parameter="chat_template",
        )
    template = asked if asked is not None else own
    if template is None:
        raise InvalidRequest(
            "this model has no chat template, so it cannot take messages. Use /v1/completions or LLM.generate, or give a "
            "chat_template.",
            parameter="messages",
        )
    return template


def _read_extra(template: CompiledTemplate, extra: Mapping[str, Any], special_tokens: Mapping[str, str]) -> dict[str, Any]:
    """Only what the template reads and nobody else sets: a misspelt name would be ignored without a word."""
    if not isinstance(extra, Mapping):
        raise InvalidRequest("chat_template_kwargs must be an object.", parameter="chat_template_kwargs", value=extra)
    allowed = template.variables - _OWN_VARIABLES - set(special_tokens)
    allowed = frozenset(name for name in allowed if not name.endswith("_token"))
    for name in extra:
        if name in allowed:
            continue
        if name in _OWN_VARIABLES or name in special_tokens:
            reason = "it is set by the server"
        else:
            known = f"it reads {', '.join(sorted(allowed))}" if allowed else "it reads none"
            reason = f"the model's chat template does not read it; {known}"
        raise InvalidRequest(
            f"chat_template_kwargs cannot have {name!r}: {reason}.{did_you_mean(str(name), allowed)}",
            parameter=f"chat_template_kwargs.{name}",
        )
    return {name: _plain(value, f"chat_template_kwargs.{name}") for name, value in extra.items()}


def normalise(messages: Sequence[Mapping[str, Any]], *, as_parts: bool = False) -> list[dict[str, Any]]:
    """Messages as templates expect them, copied: no null entries, content one text (or text parts, for templates that walk
    over them), tool-call arguments as objects and not as JSON text, reasoning under all its names."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequest("messages must be a list of objects.", parameter="messages", value=messages)
    if not messages:
        raise InvalidRequest("messages must have at least one message.", parameter="messages", value=[])
    return [_normalise_one(message, f"messages[{place}]", as_parts) for place, message in enumerate(messages)]


def _normalise_one(message: Mapping[str, Any], where: str, as_parts: bool) -> dict[str, Any]:
    plain = _plain(message, where)
    if not isinstance(plain, dict):
        raise InvalidRequest(f"{where} must be an object.", parameter=where, value=message)
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role must be a non-empty string, got {role!r}.", parameter=f"{where}.role")
    plain = {key: value for key, value in plain.items() if value is not None}
    if "content" in plain:
        plain["content"] = _read_content(plain["content"], f"{where}.content", as_parts)
    for call in plain.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _read_arguments(function["arguments"])
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _read_arguments(arguments: str) -> Any:
    """OpenAI's clients send a tool call's arguments as JSON text; text that is no object was the model's own and stays."""
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return read if isinstance(read, dict) else arguments


def _read_content(content: Any, where: str, as_parts: bool) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of text parts.", parameter=where, value=content)
    texts = [_text_of(part, f"{where}[{place}]") for place, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts] if as_parts else "\n".join(texts)


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind not in _TEXT_PARTS:
        raise InvalidRequest(
            f"{where}.type must be 'text', got {kind!r}: models here read text only.", parameter=f"{where}.type"
        )
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.{_TEXT_PARTS[kind]} must be a string.", parameter=where, value=part)
    return text


def _read_objects(values: Sequence[Mapping[str, Any]] | None, name: str) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    plain = _plain(values, name)
    if not isinstance(plain, list) or not all(isinstance(value, dict) for value in plain):
        raise InvalidRequest(f"{name} must be a list of objects.", parameter=name)
    return plain


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in JSON's own types: other objects have methods that the sandbox cannot judge."""
    if depth > _MAX_DEPTH:
        raise InvalidRequest(
            f"{where.split('[')[0].split('.')[0]} is nested deeper than {_MAX_DEPTH} levels.", parameter=where[:80]
        )
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic objects, as the openai client returns them
        value = dump(exclude_none=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item, f"{where}[{place}]", depth + 1) for place, item in enumerate(value)]
    raise InvalidRequest(f"{where} must be plain JSON data, got {type(value).__name__}.", parameter=where)


def _open_final_message(messages: list[dict[str, Any]], template: CompiledTemplate) -> str:
    """Put a tag at the end of the last message, to find the place again in the rendered text; returns the message's text."""
    final = messages[-1]
    content = final.get("content")
    if content is None or "content" not in template.source:
        raise InvalidRequest(
            "continue_final_message needs a last message with content, and a chat template that reads it.",
            parameter="continue_final_message",
            value=True,
        )
    if isinstance(content, str):
        final["content"] = content + _TAG
        return content
    if not content:
        raise InvalidRequest("continue_final_message needs a last message with text.", parameter="continue_final_message")
    part = content[-1]
    text: str = part["text"]
    part["text"] = text + _TAG
    return text


def _cut_final_message(text: str, final: str) -> str:
    """Cut the text at the tag; a template that trims messages has trimmed the tag's space too, and then so do we."""
    tag = _TAG.strip()
    if tag not in text or final.strip() not in text:
        raise InvalidRequest(
            "continue_final_message is set, but the chat template does not render the last message as it is.",
            parameter="continue_final_message",
            value=True,
        )
    place = text.rindex(tag)
    return text[:place] if text.startswith(_TAG, place) else text[:place].rstrip()
