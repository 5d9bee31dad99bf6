"""POST /v1/chat/completions, whole and streamed, on the real engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.frames import finish_reasons, stream, texts

PATH = "/v1/chat/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "the quick fox"}], "max_tokens": 6, "seed": 7}


def ask(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    answer = client.post(PATH, json={**HELLO, **changes})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_whole_answer(client: httpx.Client) -> None:
    body = ask(client, ignore_eos=True)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = body["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert "prompt_tokens_details" not in usage


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_tells_the_same(client: httpx.Client, temperature: float) -> None:
    whole = ask(client, temperature=temperature)
    events = stream(client, PATH, {**HELLO, "temperature": temperature})
    assert texts(events) == {0: whole["choices"][0]["message"]["content"]}
    assert finish_reasons(events) == {0: [whole["choices"][0]["finish_reason"]]}
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)


def test_role_only_in_the_first_delta_of_each_index(client: httpx.Client) -> None:
    events = stream(client, PATH, {**HELLO, "n": 3, "stream_options": {"include_usage": True}})
    seen: set[int] = set()
    for event in events[:-1]:
        (choice,) = event["choices"]
        assert ("role" in choice["delta"]) == (choice["index"] not in seen)
        seen.add(choice["index"])
    assert seen == {0, 1, 2}
    assert all(len(reasons) == 1 for reasons in finish_reasons(events).values())
    assert events[-1]["choices"] == []
    whole = ask(client, n=3)
    assert events[-1]["usage"] == whole["usage"]
    assert texts(events) == {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}
    assert len({choice["message"]["content"] for choice in whole["choices"]}) > 1


def test_running_usage(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(client, PATH, {**HELLO, "ignore_eos": True, "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_logprobs(client: httpx.Client) -> None:
    body = ask(client, logprobs=True, top_logprobs=3, ignore_eos=True)
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] <= entry["top_logprobs"][0]["logprob"] <= 0
        assert all(0 <= byte < 256 for byte in entry["bytes"])
    told = b"".join(bytes(entry["bytes"]) for entry in content).decode("utf-8", "replace")
    assert told == body["choices"][0]["message"]["content"]
    events = stream(client, PATH, {**HELLO, "logprobs": True, "top_logprobs": 3, "ignore_eos": True})
    streamed = [
        entry
        for event in events
        for choice in event["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert streamed == content


def test_no_alternatives_asked_gives_empty_lists(client: httpx.Client) -> None:
    content = ask(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in content)


def test_token_ids_and_names(client: httpx.Client) -> None:
    body = ask(client, return_token_ids=True, logprobs=True, return_tokens_as_token_ids=True, ignore_eos=True)
    (choice,) = body["choices"]
    assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
    assert [f"token_id:{token}" for token in choice["token_ids"]] == [entry["token"] for entry in choice["logprobs"]["content"]]
    events = stream(client, PATH, {**HELLO, "return_token_ids": True, "ignore_eos": True})
    assert events[0]["prompt_token_ids"] == body["prompt_token_ids"]
    streamed = [token for event in events for part in event["choices"] for token in part.get("token_ids", [])]
    assert streamed == choice["token_ids"]


def test_prompt_logprobs(client: httpx.Client) -> None:
    body = ask(client, prompt_logprobs=1)
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert all(entry["rank"] >= 1 for at in body["prompt_logprobs"][1:] for entry in at.values())


def test_continue_and_echo(client: httpx.Client) -> None:
    messages = [*HELLO["messages"], {"role": "assistant", "content": "jumps over"}]
    body = ask(client, messages=messages, continue_final_message=True, echo=True, temperature=0)
    assert body["choices"][0]["message"]["content"].startswith("jumps over")
    count = client.post("/tokenize", json={"messages": messages, "continue_final_message": True}).json()["count"]
    assert body["usage"]["prompt_tokens"] == count
    plain = ask(client, messages=messages, continue_final_message=True, temperature=0)
    asked = {**HELLO, "messages": messages, "continue_final_message": True, "temperature": 0, "echo": True}
    events = stream(client, PATH, asked)
    assert texts(events)[0] == "jumps over" + plain["choices"][0]["message"]["content"]


def test_content_parts_developer_role_and_unknown_keys(client: httpx.Client) -> None:
    plain = ask(client, messages=[{"role": "system", "content": "a"}, {"role": "user", "content": "b\nc"}])
    parts = [
        {"role": "developer", "content": "a", "refusal": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}], "x-client": 3},
    ]
    told = ask(client, messages=parts)
    assert told["choices"] == plain["choices"]
    assert told["usage"] == plain["usage"]


def test_meaningless_fields_are_accepted(client: httpx.Client) -> None:
    body = ask(
        client, user="someone", store=False, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True,
        response_format={"type": "text"}, modalities=["text"], tool_choice="none", logit_bias={}, stop=None,
    )  # fmt: skip
    assert body["choices"] == ask(client)["choices"]


def test_default_max_tokens_is_what_fits(client: httpx.Client, engine: Any) -> None:
    asked = {"messages": HELLO["messages"], "ignore_eos": True, "model": "tiny"}
    body = client.post(PATH, json=asked).json()
    assert body["usage"]["total_tokens"] == engine.plan.max_model_len
    assert body["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens(client: httpx.Client) -> None:
    asked = {"messages": HELLO["messages"], "ignore_eos": True, "max_completion_tokens": 3}
    assert client.post(PATH, json=asked).json()["usage"]["completion_tokens"] == 3


def test_stop_string(client: httpx.Client) -> None:
    text = ask(client, temperature=0, ignore_eos=True, max_tokens=20)["choices"][0]["message"]["content"]
    middle = text[len(text) // 2]
    choice = ask(client, temperature=0, ignore_eos=True, max_tokens=20, stop=[middle])["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == middle
    assert choice["message"]["content"] == text[: text.index(middle)]


def test_preset_of_a_request(client: httpx.Client) -> None:
    greedy = ask(client, temperature=0, seed=1)
    assert ask(client, preset="code", seed=2)["choices"] == greedy["choices"]


def test_request_id(client: httpx.Client) -> None:
    answer = client.post(PATH, json=HELLO, headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.json()["id"] == "chatcmpl-abc-1"
    assert client.post(PATH, json={**HELLO, "request_id": "mine"}).json()["id"] == "chatcmpl-mine"
    odd = client.post(PATH, json=HELLO, headers={"x-request-id": "a b<script>"})
    assert len(odd.headers["x-request-id"]) == 32


def test_same_request_id_at_the_same_time(client: httpx.Client) -> None:
    with client.stream("POST", PATH, json={**HELLO, "request_id": "twice", "stream": True, "max_tokens": 100}) as first:
        assert first.status_code == 200
        assert ask(client, request_id="twice")["id"] == "chatcmpl-twice"
        assert b"[DONE]" in first.read()
