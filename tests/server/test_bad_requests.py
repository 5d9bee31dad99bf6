"""Each bad field gets its 4xx with field, range and value, and the next request is unharmed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.running import RunningServer, at_rest, wait_for

GOOD = {"prompt": "the quick", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
USER = [{"role": "user", "content": "hello"}]

# field, bad value, words of the message
SAMPLING: list[tuple[str, Any, str]] = [
    ("temperature", -0.5, "temperature must be in [0, 2], got -0.5"),
    ("temperature", 2.5, "temperature must be in [0, 2], got 2.5"),
    ("temperature", "hot", "temperature must be a number, got 'hot'"),
    ("temperature", True, "temperature must be a number, got True"),
    ("top_p", 0, "top_p must be in (0, 1], got 0"),
    ("top_p", 1.5, "top_p must be in (0, 1], got 1.5"),
    ("top_k", -2, "top_k must be 0 (disable), or at least 1, got -2"),
    ("top_k", 1.5, "top_k must be an integer, got 1.5"),
    ("min_p", 1.1, "min_p must be in [0, 1], got 1.1"),
    ("presence_penalty", 3, "presence_penalty must be in [-2, 2], got 3"),
    ("frequency_penalty", -3, "frequency_penalty must be in [-2, 2], got -3"),
    ("repetition_penalty", 0, "repetition_penalty must be greater than zero, got 0"),
    ("n", 0, "n must be at least 1, got 0"),
    ("n", 2, "n must be 1 when using greedy sampling, got 2"),
    ("n", 1000, "at most 128, got 1000"),
    ("best_of", 0, "best_of must be at least 1, got 0"),
    ("max_tokens", 0, "max_tokens must be at least 1, got 0"),
    ("max_tokens", -1, "max_tokens must be at least 1, got -1"),
    ("max_tokens", 100000, "maximum context length is 512 tokens"),
    ("max_tokens", "5", "max_tokens must be an integer, got '5'"),
    ("min_tokens", 9, "min_tokens must be less than or equal to max_tokens=4, got 9"),
    ("min_tokens", -1, "min_tokens must be greater than or equal to 0, got -1"),
    ("seed", -5, "seed must be in [0, 2**63 - 1], got -5"),
    ("seed", 2**70, "seed must be"),
    ("seed", 1.5, "seed must be an integer, got 1.5"),
    ("stop", [""], "stop cannot contain an empty string"),
    ("stop", 3, "stop must be a string or a list, got 3"),
    ("stop", ["x"] * 17, "stop must have at most 16 entries, got 17"),
    ("stop", "x" * 257, "at most 256 characters, got 257"),
    ("stop_token_ids", [99999], "stop_token_ids contain out-of-vocab token ids. Vocabulary size:"),
    ("stop_token_ids", ["a"], "stop_token_ids.0 must be an integer, got 'a'"),
    ("logit_bias", {"99999": 1}, "logit_bias contain out-of-vocab token ids"),
    ("logit_bias", {"word": 1}, "logit_bias must map token ids to finite numbers"),
    ("logit_bias", [1], "logit_bias must be an object, got [1]"),
    ("logit_bias", {str(i): 1 for i in range(1025)}, "logit_bias must have at most 1024 entries, got 1025"),
    ("allowed_token_ids", [], "allowed_token_ids must not be empty"),
    ("allowed_token_ids", [-1], "allowed_token_ids contain out-of-vocab"),
    ("bad_words", [""], "bad_words cannot contain an empty string"),
    ("truncate_prompt_tokens", 0, "truncate_prompt_tokens must be -1 or at least 1, got 0"),
    ("truncate_prompt_tokens", 600, "truncate_prompt_tokens must be at most the context length of 512, got 600"),
    ("prompt_logprobs", 30, "Requested prompt logprobs of 30, which is greater than max allowed: 20"),
    ("priority", 3, "priority must be 0 unless"),
    ("cache_salt", "", "cache_salt must have 1 to 256 characters, got 0"),
    ("request_id", "a b", "request_id must have 1 to 128 letters"),
    ("preset", "chatty", 'Did you mean "chat"?'),
    ("response_format", {"type": "json_object"}, "response_format.type must be 'text'"),
    ("response_format", {"type": "json_schema", "json_schema": {}}, "response_format.type must be 'text'"),
    ("stream_options", {"include_usage": True}, "Stream options can only be defined when `stream=True`."),
    ("structured_outputs", {"json": {}}, "structured_outputs is not supported"),
    ("guided_json", {}, "guided_json is not supported"),
    ("guided_regex", "a", "guided_regex is not supported"),
    ("guided_choice", ["a"], "guided_choice is not supported"),
    ("guided_grammar", "a", "guided_grammar is not supported"),
    ("chat_template", "x", "chat_template is not supported"),
    ("temprature", 1, "unknown field 'temprature'. Did you mean \"temperature\"?"),
    ("max_token", 1, 'Did you mean "max_tokens"?'),
    ("zzz", 1, "unknown field 'zzz'."),
]
COMPLETION: list[tuple[str, Any, str]] = [
    ("prompt", None, "prompt is required"),
    ("prompt", [], "prompt must be a string"),
    ("prompt", 5, "prompt must be a string"),
    ("prompt", [1, "a"], "prompt must be a string"),
    ("prompt", [[1], []], "prompt must be a string"),
    ("prompt", [1, True], "prompt must be a string"),
    ("prompt", [1, 99999], "prompt contains token ids outside the vocabulary of"),
    ("prompt", [-1], "prompt contains token ids outside the vocabulary of"),
    ("prompt", [5] * 512, "your prompt has 512 tokens"),
    ("prompt", ["a"] * 129, "n x prompts at most 128, got 1 x 129"),
    ("logprobs", 30, "Requested sample logprobs of 30, which is greater than max allowed: 20"),
    ("logprobs", -2, "logprobs must be non-negative or -1, got -2"),
    ("logprobs", True, "logprobs must be an integer, got True"),
    ("suffix", "end", "suffix is not supported"),
    ("prompt_embeds", "AAAA", "prompt_embeds is not supported"),
]
CHAT: list[tuple[str, Any, str]] = [
    ("messages", None, "messages is required"),
    ("messages", [], "messages must have at least one message"),
    ("messages", "hi", "messages must be a list, got 'hi'"),
    ("messages", [1], "messages[0] must be an object"),
    ("messages", [{"role": "robot", "content": "x"}], "messages[0].role must be one of system"),
    ("messages", [{"role": "user"}], "messages[0].content must be a string"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content must be a string"),
    ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "must be 'text'"),
    ("messages", [{"role": "user", "content": "fox " * 2000}], "maximum context length is 512 tokens"),
    ("top_logprobs", 3, "when using `top_logprobs`, `logprobs` must be set to true."),
    ("tools", [{"type": "function"}], "tools is not supported"),
    ("tools", [], "tools is not supported"),
    ("tool_choice", "required", "tool_choice is not supported"),
    ("functions", [{}], "functions is not supported"),
    ("modalities", ["audio"], "modalities must be ['text']"),
    ("max_completion_tokens", 100000, "maximum context length is 512 tokens"),
    ("continue_final_message", True, "continue_final_message needs a final message of role 'assistant'"),
    ("chat_template_kwargs", {"enable_thinking": True}, "chat_template_kwargs"),
]


@pytest.fixture(scope="module")
def expected(server: RunningServer) -> Any:
    return httpx.post(f"{server.url}/v1/completions", json=GOOD).json()["choices"]


def refused(client: httpx.Client, path: str, body: dict[str, Any], field: str, words: str, expected: Any) -> None:
    for streamed in (False, True):
        if streamed and field in ("stream_options", "prompt_logprobs"):
            continue
        answer = client.post(path, json={**body, "stream": True} if streamed else body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "BadRequestError"
        assert error["code"] == 400
        assert words in error["message"]
        if error["param"] is not None:
            assert error["param"].split("[")[0].split(".")[0] == field
    assert client.post("/v1/completions", json=GOOD).json()["choices"] == expected


@pytest.mark.parametrize(("field", "value", "words"), SAMPLING + COMPLETION)
def test_completions(client: httpx.Client, expected: Any, field: str, value: Any, words: str) -> None:
    refused(client, "/v1/completions", {**GOOD, field: value}, field, words, expected)


@pytest.mark.parametrize(("field", "value", "words"), SAMPLING + CHAT)
def test_chat(client: httpx.Client, expected: Any, field: str, value: Any, words: str) -> None:
    body = {**GOOD, "messages": USER, field: value}
    del body["prompt"]
    refused(client, "/v1/chat/completions", body, field, words, expected)


def test_alternatives_beyond_the_limit_name_the_clients_field(client: httpx.Client) -> None:
    body = {"messages": USER, "logprobs": True, "top_logprobs": 21}
    error = client.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "top_logprobs"
    assert "greater than max allowed: 20" in error["message"]


def test_streamed_combinations(client: httpx.Client) -> None:
    for extra, param in (
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"best_of": 3, "temperature": 1}, "best_of"),
    ):
        answer = client.post("/v1/completions", json={**GOOD, "stream": True, **extra})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_unknown_model(client: httpx.Client) -> None:
    for path, body in (("/v1/completions", GOOD), ("/v1/chat/completions", {"messages": USER}), ("/tokenize", {"prompt": "a"})):
        answer = client.post(path, json={**body, "model": "gpt-9"})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error == {
            "message": "The model `gpt-9` does not exist.", "type": "NotFoundError", "param": "model", "code": 404
        }  # fmt: skip
    assert client.get("/v1/models/gpt-9").status_code == 404


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "the body must be JSON"),
        (b"{", "the body must be JSON"),
        (b"[1]", "the body must be a JSON object, got a list"),
        (b"null", "the body must be a JSON object, got null"),
        (b'{"prompt": "a", "temperature": NaN}', "JSON, which has no NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "JSON, which has no -Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "beyond the range"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' appears twice"),
        (b'{"prompt": ' + b"[" * 200_000, "nested"),
        (b'{"prompt": ' + b"[" * 50 + b"]" * 50 + b"}", "nested at most 32 levels"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "\xff"}', "must be UTF-8"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_json(client: httpx.Client, raw: bytes, words: str) -> None:
    answer = client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_at_most_ten_findings(client: httpx.Client) -> None:
    wrong = {name: [] for name in ("temperature", "top_p", "top_k", "min_p", "seed", "n", "best_of", "min_tokens")}
    wrong |= {name: {} for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "priority", "echo")}
    message = client.post("/v1/completions", json={"prompt": "a", **wrong}).json()["error"]["message"]
    assert message.count(" must be ") == 10
    assert "and 3 more." in message


def test_unknown_fields_can_be_relaxed(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    for mode in ("warn", "ignore"):
        with RunningServer(engine, unknown_fields=mode) as server:
            answer = httpx.post(f"{server.url}/v1/completions", json={**GOOD, "temprature": 1})
            assert answer.status_code == 200
            refused_by_name = httpx.post(f"{server.url}/v1/completions", json={**GOOD, "guided_json": {}})
            assert refused_by_name.status_code == 400


def test_wrong_paths_and_methods(client: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/models", 405),
        ("GET", "/docs", 404),
    ):
        answer = client.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status


def test_nothing_is_left_behind(server: RunningServer) -> None:
    wait_for(lambda: at_rest(server))


def test_a_fault_of_ours_shows_no_details(server: RunningServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret at /root/models/x 0x7f0000000000")

    monkeypatch.setattr(server.application, "start", broken)
    answer = client.post("/v1/completions", json=GOOD)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert "secret" not in json.dumps(error)
    assert answer.headers["x-request-id"] in error["message"]
    monkeypatch.undo()
    assert client.post("/v1/completions", json=GOOD).status_code == 200
