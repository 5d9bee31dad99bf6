"""POST /v1/completions, whole and streamed, on the real engine."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest

from tests.server.frames import finish_reasons, stream, texts

PATH = "/v1/completions"
ASKED = {"prompt": "the quick", "max_tokens": 5, "seed": 3, "ignore_eos": True}


def ask(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    answer = client.post(PATH, json={**ASKED, **changes})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids_of(client: httpx.Client, text: str) -> list[int]:
    return client.post("/tokenize", json={"prompt": text}).json()["tokens"]


def test_text_and_token_ids_are_the_same_prompt(client: httpx.Client) -> None:
    text = ask(client)
    assert text["object"] == "text_completion"
    assert text["id"].startswith("cmpl-")
    assert text["choices"] == ask(client, prompt=ids_of(client, "the quick"))["choices"]


def test_default_is_sixteen_tokens(client: httpx.Client) -> None:
    body = client.post(PATH, json={"prompt": "fox", "ignore_eos": True}).json()
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("as_ids", [False, True])
def test_many_prompts_times_n_in_prompt_major_order(client: httpx.Client, as_ids: bool) -> None:
    words = ["the quick", "lazy dog", "fox"]
    alone = [ask(client, prompt=word, n=2)["choices"] for word in words]
    prompt = [ids_of(client, word) for word in words] if as_ids else words
    body = ask(client, prompt=prompt, n=2)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [choice["text"] for choice in body["choices"]] == [choice["text"] for pair in alone for choice in pair]
    assert body["usage"]["completion_tokens"] == 30
    events = stream(client, PATH, {**ASKED, "prompt": prompt, "n": 2, "stream_options": {"include_usage": True}})
    assert texts(events[:-1]) == {choice["index"]: choice["text"] for choice in body["choices"]}
    assert finish_reasons(events[:-1]) == {index: ["length"] for index in range(6)}
    assert events[-1]["usage"] == body["usage"]


def test_echo(client: httpx.Client) -> None:
    plain, echoed = ask(client), ask(client, echo=True)
    assert echoed["choices"][0]["text"] == "the quick" + plain["choices"][0]["text"]
    assert echoed["usage"] == plain["usage"]
    assert texts(stream(client, PATH, {**ASKED, "echo": True}))[0] == echoed["choices"][0]["text"]


def test_logprobs_in_the_older_layout(client: httpx.Client) -> None:
    choice = ask(client, logprobs=2)["choices"][0]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == 5
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[token] == logprob or "�" in token
        assert 1 <= len(top) <= 3
    assert told["text_offset"] == [sum(map(len, told["tokens"][:place])) for place in range(5)]
    events = stream(client, PATH, {**ASKED, "logprobs": 2})
    parts = [choice["logprobs"] for event in events for choice in event["choices"]]
    for name in ("tokens", "text_offset"):
        assert [value for part in parts for value in part[name]] == told[name]


@pytest.mark.parametrize("streamed", [False, True])
def test_echo_alone_scores_the_prompt(client: httpx.Client, streamed: bool) -> None:
    asked = {"prompt": ["the quick brown", "fox"], "echo": True, "max_tokens": 0, "logprobs": 1}
    if streamed:
        events = stream(client, PATH, {**asked, "stream_options": {"include_usage": True}})
        usage = events.pop()["usage"]
        choices = [choice for event in events for choice in event["choices"]]
    else:
        body = client.post(PATH, json=asked).json()
        usage, choices = body["usage"], body["choices"]
    choices.sort(key=lambda choice: choice["index"])
    assert [choice["text"] for choice in choices] == asked["prompt"]
    assert [choice["finish_reason"] for choice in choices] == ["length", "length"]
    assert usage["completion_tokens"] == 0
    told = choices[0]["logprobs"]
    assert "".join(told["tokens"]) == "the quick brown"
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert all(value < 0 for value in told["token_logprobs"][1:])
    assert len(told["tokens"]) == len(ids_of(client, "the quick brown"))


def test_echoed_logprobs_equal_those_of_generation(client: httpx.Client) -> None:
    made = ask(client, logprobs=0, return_token_ids=True, temperature=0)["choices"][0]
    ids = made["prompt_token_ids"] + made["token_ids"]
    scored = client.post(PATH, json={"prompt": ids, "echo": True, "max_tokens": 0, "logprobs": 0}).json()
    assert scored["choices"][0]["logprobs"]["token_logprobs"][-5:] == made["logprobs"]["token_logprobs"]


def test_best_of(client: httpx.Client) -> None:
    all_of_them = ask(client, n=4, logprobs=0)["choices"]
    means = {
        choice["text"]: math.fsum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["tokens"])
        for choice in all_of_them
    }
    best = ask(client, n=1, best_of=4)
    assert best["choices"][0]["text"] == max(means, key=means.__getitem__)
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == 20


def test_beam_search(client: httpx.Client) -> None:
    body = ask(client, use_beam_search=True, n=3, temperature=0)
    found = [choice["text"] for choice in body["choices"]]
    assert len(set(found)) == 3
    assert body["choices"] == ask(client, use_beam_search=True, n=3, temperature=0)["choices"]


def test_truncation_keeps_the_end(client: httpx.Client) -> None:
    ids = ids_of(client, "the quick brown fox jumps over the lazy dog")
    assert ask(client, prompt=ids, truncate_prompt_tokens=3)["choices"] == ask(client, prompt=ids[-3:])["choices"]
    long = ids * 100
    body = ask(client, prompt=long, truncate_prompt_tokens=-1)
    assert body["usage"]["prompt_tokens"] == 512 - 5


def test_seed_min_tokens_bias_and_cache_salt(client: httpx.Client) -> None:
    token = ids_of(client, "fox")[-1]
    body = ask(client, logit_bias={str(token): 100}, return_token_ids=True, temperature=0)
    assert body["choices"][0]["token_ids"] == [token] * 5
    assert ask(client, cache_salt="s")["choices"] == ask(client)["choices"]
    assert ask(client, allowed_token_ids=[token], return_token_ids=True)["choices"][0]["token_ids"] == [token] * 5
    body = ask(client, ignore_eos=False, min_tokens=5, logit_bias={"1": 100})
    assert body["usage"]["completion_tokens"] == 5


def test_special_tokens_can_be_left_out(client: httpx.Client) -> None:
    assert ask(client, add_special_tokens=False)["usage"]["prompt_tokens"] <= ask(client)["usage"]["prompt_tokens"]


def test_cached_tokens_are_told_when_asked_for(engine: Any) -> None:
    from tests.server.running import RunningServer

    with (
        RunningServer(engine, enable_prompt_tokens_details=True, enable_force_include_usage=True) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        prompt = "jumps over the lazy dog " * 8
        first, second = (ask(client, prompt=prompt, cache_salt="details")["usage"] for _ in range(2))
        assert first["prompt_tokens_details"]["cached_tokens"] == 0
        assert second["prompt_tokens_details"]["cached_tokens"] >= 16
        assert "usage" in stream(client, PATH, ASKED)[-1]
