"""Models, limits, tokenize, health, metrics and the console."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

import quire
from quire import presets
from tests.server.running import RunningServer


def test_models(client: httpx.Client, engine: Any) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["tiny", "other-name"]
    card = client.get("/v1/models/other-name").json()
    assert card["object"] == "model"
    assert card["owned_by"] == "quire"
    assert card["max_model_len"] == engine.plan.max_model_len
    assert "/" not in card["root"]


def test_every_served_name_answers_under_the_first(client: httpx.Client) -> None:
    for name in ("tiny", "other-name", None, ""):
        asked = {"prompt": "a", "max_tokens": 1, "model": name}
        assert client.post("/v1/completions", json=asked).json()["model"] == "tiny"


def test_a_folder_is_served_under_its_own_name(engine: Any) -> None:
    with RunningServer(engine) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "tiny-llama"
        asked = {"prompt": "a", "max_tokens": 1, "model": engine.config.model}
        assert httpx.post(f"{server.url}/v1/completions", json=asked).json()["model"] == "tiny-llama"


def test_limits_and_presets(client: httpx.Client, engine: Any) -> None:
    body = client.get("/v1/limits").json()
    assert body["limits"]["max_model_len"] == engine.plan.max_model_len
    assert body["limits"]["max_body_bytes"] == 8 << 20
    assert body["load"]["running"] == 0
    rows = client.get("/v1/presets").json()["data"]
    assert [row["name"] for row in rows] == presets.names()


def test_tokenize_and_back(client: httpx.Client, engine: Any) -> None:
    text = "the quick brown fox — naïve 日本"
    body = client.post("/tokenize", json={"prompt": text, "return_token_strs": True, "model": "tiny"}).json()
    assert body["tokens"] == engine.tokenizer.encode(text)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == engine.plan.max_model_len
    plain = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert client.post("/detokenize", json={"tokens": plain["tokens"]}).json()["prompt"] == text


def test_tokenize_messages(client: httpx.Client, engine: Any) -> None:
    messages = [{"role": "user", "content": "fox"}]
    body = client.post("/tokenize", json={"messages": messages}).json()
    assert body["tokens"] == engine.tokenizer.encode("<|user|>fox</s><|assistant|>", add_special_tokens=False)
    assert body["token_strs"] is None
    without = client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert without["count"] < body["count"]


def test_tokenize_refusals(client: httpx.Client) -> None:
    for path, body, words in (
        ("/tokenize", {}, "exactly one of prompt and messages"),
        ("/tokenize", {"prompt": "a", "messages": []}, "exactly one of prompt and messages"),
        ("/tokenize", {"promt": "a"}, 'Did you mean "prompt"?'),
        ("/tokenize", {"prompt": 5}, "prompt must be a string"),
        ("/detokenize", {}, "tokens is required"),
        ("/detokenize", {"tokens": [10**9]}, "tokens must be token ids in [0, 3"),
        ("/detokenize", {"tokens": [-1]}, "tokens must be token ids"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0 must be an integer"),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]


def test_health_and_version(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    health = client.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert client.head("/readyz").status_code == 200
    assert client.get("/version").json() == {"version": quire.__version__}


EXPECTED = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits", "vllm:num_preemptions", "vllm:prompt_tokens", "vllm:generation_tokens",
    "vllm:prompt_tokens_cached", "vllm:iteration_tokens_total", "vllm:request_success", "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens", "vllm:request_params_n", "vllm:request_params_max_tokens",
    "vllm:request_max_num_generation_tokens", "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds", "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds",
    "vllm:request_inference_time_seconds", "vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds",
    "vllm:request_num_preemptions", "vllm:cache_config_info", "vllm:admission_rejections", "vllm:corrupted_requests",
    "quire:http_requests", "quire:queued_samples", "quire:queued_prompt_tokens", "quire:engine_heartbeat_age_seconds",
}  # fmt: skip


def scrape(client: httpx.Client) -> dict[str, float]:
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(answer.text))
    names = {family.name for family in families}
    assert names >= EXPECTED, EXPECTED - names
    samples = {}
    for family in families:
        for sample in family.samples:
            if sample.name.startswith("vllm:") and sample.name != "vllm:cache_config_info":
                assert sample.labels["engine"] == "0"
                assert sample.labels["model_name"]
            extra = {key: value for key, value in sample.labels.items() if key not in ("engine", "model_name")}
            samples[sample.name + (str(sorted(extra.items())) if extra else "")] = sample.value
    return samples


def test_metrics_count_what_happened(client: httpx.Client) -> None:
    before = scrape(client)
    asked = {"prompt": "the quick", "max_tokens": 7, "ignore_eos": True, "n": 2}
    usage = client.post("/v1/completions", json=asked).json()["usage"]
    after = scrape(client)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("vllm:generation_tokens_total") == usage["completion_tokens"] == 14
    assert more("vllm:prompt_tokens_total") >= usage["prompt_tokens"]
    assert more("vllm:request_success_total[('finished_reason', 'length')]") == 2
    assert more("vllm:time_to_first_token_seconds_count") >= 1
    assert more("vllm:inter_token_latency_seconds_count") == 12
    assert more("vllm:e2e_request_latency_seconds_count") == 1
    assert more("quire:http_requests_total[('endpoint', '/v1/completions'), ('status', '200')]") == 1
    assert after["vllm:num_requests_running"] == 0


def test_the_api_describes_itself(client: httpx.Client) -> None:
    body = client.get("/openapi.json").json()
    asked = body["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert asked["required"] == ["messages"]
    assert "$ref" not in str(asked)


def test_metric_labels_are_bounded(client: httpx.Client) -> None:
    for path in ("/a", "/b/c", "/v1/models/x1", "/v1/models/x2"):
        client.get(path)
    endpoints = set(re.findall(r'quire:http_requests_total{endpoint="([^"]*)"', client.get("/metrics").text))
    assert "other" in endpoints
    assert not endpoints & {"/a", "/b/c", "/v1/models/x1"}


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "style", "the page's policy allows no inline style"
        for name, value in attrs:
            assert not name.startswith("on"), "the page's policy allows no inline script"
            if name in ("src", "href"):
                self.links.append(value or "")
            if name == "id":
                self.ids.add(value or "")


def test_the_console_is_whole_and_asks_nobody_else(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    parser = _Links()
    parser.feed(page.text)
    for link in parser.links:
        assert not link.startswith(("http", "//", "/"))
        assert client.get(f"/{link}").status_code == 200
    script = client.get("/console/console.js").text
    assert set(re.findall(r'byId\("([\w-]+)"\)', script)) <= parser.ids
    assert "innerHTML" not in script
    assert client.get("/console/../app.py").status_code == 404
    assert client.get("/console/%2e%2e/app.py").status_code == 404
