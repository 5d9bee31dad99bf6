"""One line of a training file, in any of the usual layouts, as the one form that the rest of the room reads.

Layouts: OpenAI's `messages`; `prompt` with `completion` (texts, or lists of messages as TRL has them); `text`; ShareGPT's
`conversations`; pairs for DPO as OpenAI (`input`, `preferred_output`, `non_preferred_output`) and TRL (`prompt`, `chosen`,
`rejected`) write them. Knows no template and no token. What is wrong is a Problem with field and remedy, never an exception.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.errors import did_you_mean

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
# Layout -> (fields that mark it, other fields that it may have).
LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools", "parallel_tool_calls", "functions")),
    "ShareGPT conversations": (("conversations",), ("system", "tools")),
    "OpenAI preference pairs": (("input", "preferred_output", "non_preferred_output"), ()),
    "TRL preference pairs": (("chosen", "rejected"), ("prompt", "tools")),
    "prompt and completion": (("prompt", "completion"), ("tools",)),
    "text": (("text",), ()),
}
PAIRS = ("OpenAI preference pairs", "TRL preference pairs")
RENAMED = {
    "instruction": "rename instruction and output to prompt and completion",
    "output": "rename instruction and output to prompt and completion",
    "question": "rename question and answer to prompt and completion",
    "response": "rename response to completion",
    "dialog": "rename dialog to messages",
    "dialogue": "rename dialogue to messages",
    "conversation": "rename conversation to messages",
}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line (from 1), where in it, and what to do."""

    line: int
    field: str
    message: str

    def __str__(self) -> str:
        place = f" {self.field}" if self.field else ""
        return f"line {self.line}:{place} {self.message}"


class Wrong(Exception):
    """A Problem on its way up; it never leaves the room."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field, self.message = field, message


@dataclass(frozen=True)
class Conversation:
    """Messages, and which of them (by place) the assistant is to learn."""

    messages: Sequence[Message]
    learned: frozenset[int]
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Written:
    """Plain text: a prompt (None: all of it is learned) and what follows it."""

    prompt: str | None
    completion: str


@dataclass(frozen=True)
class Row:
    """One line. rejected: the answer that is not wanted, with the same prompt (preference pairs only)."""

    line: int
    wanted: Conversation | Written
    rejected: Conversation | Written | None = None
    unknown: tuple[str, ...] = field(default=(), compare=False)


def layout_of(row: Mapping[str, Any]) -> str:
    """The layout of a row by its fields. Raises Wrong."""
    for name, (marks, _) in LAYOUTS.items():
        if all(mark in row for mark in marks):
            return name
    for name, advice in RENAMED.items():
        if name in row:
            raise Wrong("", f"has the fields {_listed(row)}; {advice}.")
    known = [mark for marks, _ in LAYOUTS.values() for mark in marks]
    hint = next((hint for name in row if (hint := did_you_mean(str(name), known))), "")
    raise Wrong("", f"has the fields {_listed(row)}; expected messages, or prompt and completion, or text.{hint}")


def read_row(row: Mapping[str, Any], layout: str, line: int) -> Row:
    """A row of that layout. Raises Wrong."""
    marks, others = LAYOUTS[layout]
    for mark in marks:
        if mark not in row:
            raise Wrong(mark, f"is missing: the file's first row is in the layout {layout!r}.")
    unknown = tuple(str(name) for name in row if name not in marks and name not in others)
    wanted, rejected = _READERS[layout](row)
    return Row(line, wanted, rejected, unknown)


Pair = tuple[Conversation | Written, Conversation | Written | None]


def _messages(row: Mapping[str, Any]) -> Pair:
    messages = _checked(row["messages"], "messages")
    return _conversation(messages, _tools(row.get("tools"), "tools"), "messages"), None


def _sharegpt(row: Mapping[str, Any]) -> Pair:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise Wrong("conversations", f"must be a list of turns with at least one, got {_shown(turns)}.")
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for place, turn in enumerate(turns):
        messages.append(_turn(turn, f"conversations[{place}]"))
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError:
            raise Wrong("tools", "must be a list of tools, or one as JSON text.") from None
    return _conversation(_checked(messages, "conversations"), _tools(tools or None, "tools"), "conversations"), None


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise Wrong(where, f"must be an object with from and value, got {_shown(turn)}.")
    if "role" in turn:
        return dict(turn)
    speaker, value = turn.get("from"), turn.get("value")
    if speaker not in SHAREGPT_ROLES:
        hint = did_you_mean(str(speaker), SHAREGPT_ROLES)
        raise Wrong(f"{where}.from", f"must be one of human, gpt, system, tool, got {_shown(speaker)}.{hint}")
    if not isinstance(value, str):
        raise Wrong(f"{where}.value", f"must be a text, got {_shown(value)}.")
    message: Message = {"role": SHAREGPT_ROLES[speaker], "content": value}
    if speaker == "function_call":
        message = {"role": "assistant", "content": None, "tool_calls": _called(value, f"{where}.value")}
    if "weight" in turn:
        message["weight"] = turn["weight"]
    return message


def _called(text: str, where: str) -> list[dict[str, Any]]:
    try:
        read = json.loads(text)
        calls = read if isinstance(read, list) else [read]
        return [
            {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Wrong(where, 'must be JSON such as {"name": ..., "arguments": {...}} in a function_call.') from None


def _openai_pair(row: Mapping[str, Any]) -> Pair:
    given = row["input"]
    if not isinstance(given, Mapping):
        raise Wrong("input", f"must be an object with messages, got {_shown(given)}.")
    prompt = _checked(given.get("messages"), "input.messages")
    tools = _tools(given.get("tools"), "input.tools")
    return tuple(
        _answered(prompt, _checked(row[name], name), tools, name) for name in ("preferred_output", "non_preferred_output")
    )


def _trl_pair(row: Mapping[str, Any]) -> Pair:
    prompt, tools = row.get("prompt"), _tools(row.get("tools"), "tools")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(prompt, str):
            raise Wrong("prompt", f"must be a text where chosen and rejected are texts, got {_shown(prompt)}.")
        return tuple(_written(prompt, text, name) for name, text in (("chosen", chosen), ("rejected", rejected)))
    answers = [_checked(row[name], name) for name in ("chosen", "rejected")]
    if prompt is None:  # both begin with it
        same = sum(1 for _ in _common(*answers))
        prompt, answers = answers[0][:same], [answer[same:] for answer in answers]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = _checked(prompt, "prompt") if prompt else []
    return tuple(_answered(prompt, answer, tools, name) for name, answer in zip(("chosen", "rejected"), answers, strict=True))


def _common(one: Sequence[Message], other: Sequence[Message]) -> Any:
    for left, right in zip(one, other, strict=False):
        if left != right:
            return
        yield left


def _completion(row: Mapping[str, Any]) -> Pair:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, (list, Mapping)):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        answer = _checked([completion] if isinstance(completion, Mapping) else completion, "completion")
        return _answered(_checked(prompt, "prompt"), answer, _tools(row.get("tools"), "tools"), "completion"), None
    if isinstance(prompt, list) and isinstance(completion, str):
        answer = [{"role": "assistant", "content": completion}]
        return _answered(_checked(prompt, "prompt"), answer, _tools(row.get("tools"), "tools"), "completion"), None
    if not isinstance(prompt, str):
        raise Wrong("prompt", f"must be a text or a list of messages, got {_shown(prompt)}.")
    return _written(prompt, completion, "completion"), None


def _text(row: Mapping[str, Any]) -> Pair:
    return _written(None, row["text"], "text"), None


_READERS = {
    "messages": _messages,
    "ShareGPT conversations": _sharegpt,
    "OpenAI preference pairs": _openai_pair,
    "TRL preference pairs": _trl_pair,
    "prompt and completion": _completion,
    "text": _text,
}


def _written(prompt: str | None, completion: Any, name: str) -> Written:
    if not isinstance(completion, str) or not completion:
        raise Wrong(name, f"must be a text that is not empty, got {_shown(completion)}.")
    return Written(prompt, completion)


def _answered(
    prompt: list[Message], answer: list[Message], tools: Sequence[Mapping[str, Any]] | None, name: str
) -> Conversation:
    """A prompt with the answer that is to be learned."""
    if not answer:
        raise Wrong(name, "must have at least one message of the assistant.")
    for place, message in enumerate(answer):
        if message["role"] not in ("assistant", "tool"):
            raise Wrong(f"{name}[{place}].role", f"must be assistant, got {message['role']!r}.")
    given = [{key: value for key, value in message.items() if key != "weight"} for message in prompt]
    first = len(given)
    conversation = _conversation([*given, *answer], tools, name)
    return Conversation(conversation.messages, frozenset(place for place in conversation.learned if place >= first), tools)


def _conversation(messages: list[Message], tools: Sequence[Mapping[str, Any]] | None, name: str) -> Conversation:
    learned = frozenset(
        place for place, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1) != 0
    )
    if not learned:
        raise Wrong(name, "has no message of the assistant to learn (role assistant, weight not 0).")
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return Conversation(plain, learned, tools)


def _checked(messages: Any, where: str) -> list[Message]:
    """Messages that a template can be given. Raises Wrong for the first that is not one."""
    if not isinstance(messages, list) or not messages:
        raise Wrong(where, f"must be a list of messages with at least one, got {_shown(messages)}.")
    for place, message in enumerate(messages):
        _check(message, f"{where}[{place}]")
    return [dict(message) for message in messages]


def _check(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise Wrong(where, f"must be an object with role and content, got {_shown(message)}.")
    role, content = message.get("role"), message.get("content")
    if role is None:
        raise Wrong(f"{where}.role", f"is missing; one of {', '.join(ROLES)}.")
    if role not in ROLES:
        raise Wrong(f"{where}.role", f"must be one of {', '.join(ROLES)}, got {_shown(role)}.{did_you_mean(str(role), ROLES)}")
    if content is None:
        if role != "assistant" or not message.get("tool_calls"):
            raise Wrong(f"{where}.content", "is missing; only the assistant may have none, with tool_calls.")
    elif not isinstance(content, (str, list)):
        raise Wrong(f"{where}.content", f"must be a text or a list of text parts, got {_shown(content)}.")
    if "tool_calls" in message and message["tool_calls"] is not None:
        calls = message["tool_calls"]
        if role != "assistant" or not isinstance(calls, list):
            raise Wrong(f"{where}.tool_calls", "must be a list, and in a message of the assistant.")
        for number, call in enumerate(calls):
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise Wrong(f"{where}.tool_calls[{number}].function", "must be an object with name and arguments.")
    if "weight" in message:
        weight = message["weight"]
        if role != "assistant":
            raise Wrong(f"{where}.weight", f"must stand at messages of the assistant only, got one at {role!r}.")
        if isinstance(weight, bool) or weight not in (0, 1):
            raise Wrong(f"{where}.weight", f"must be 0 or 1, got {_shown(weight)}.")


def _tools(tools: Any, where: str) -> list[Mapping[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Wrong(where, f"must be a list of objects, got {_shown(tools)}.")
    return tools


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
