"""Reading a stream of server-sent events as a client does."""

from __future__ import annotations

import json
from typing import Any

import httpx


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Every event of a streamed answer; asserts that [DONE] ends it, once."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        text = answer.read().decode()
        assert answer.status_code == 200, text
        assert answer.headers["content-type"].startswith("text/event-stream")
    frames = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert frames[-1] == "[DONE]"
    assert frames.count("[DONE]") == 1
    return [json.loads(frame) for frame in frames[:-1]]


def texts(events: list[dict[str, Any]]) -> dict[int, str]:
    """The text of each index, put together."""
    made: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            made[choice["index"]] = made.get(choice["index"], "") + text
    return made


def finish_reasons(events: list[dict[str, Any]]) -> dict[int, list[str]]:
    """All finish reasons of each index; there must be one."""
    made: dict[int, list[str]] = {}
    for event in events:
        for choice in event["choices"]:
            made.setdefault(choice["index"], [])
            if choice["finish_reason"] is not None:
                made[choice["index"]].append(choice["finish_reason"])
    return made
