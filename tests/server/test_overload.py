"""More work than the limits allow is refused quickly, with a time to come back, and never harms what is running."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.server.running import RunningServer, at_rest, slow_steps, wait_for

LONG = {"prompt": "the quick", "max_tokens": 60, "ignore_eos": True, "seed": 1}


def together(count: int, ask: Callable[[], httpx.Response]) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: ask(), range(count)))


def test_queue_limit(engine: Any) -> None:
    with RunningServer(engine, max_num_queued_reqs=4) as server, slow_steps(engine, 0.01):
        rejected = engine.metrics.value("vllm:admission_rejections_total", reason="queued_requests")

        def ask() -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60)

        answers = together(20, ask)
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= 4
        for answer in answers:
            if answer.status_code == 503:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.json()["error"]["type"] == "ServiceUnavailableError"
        more = engine.metrics.value("vllm:admission_rejections_total", reason="queued_requests") - rejected
        assert more == statuses.count(503)
        wait_for(lambda: at_rest(server))


def test_refusal_is_quick_while_the_server_is_full(engine: Any) -> None:
    with (
        RunningServer(engine, max_num_queued_reqs=1) as server,
        slow_steps(engine, 0.02),
        ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        client.get("/livez")
        first = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=60)
        wait_for(lambda: server.application.admission.samples == 1)
        began = time.monotonic()
        assert client.post("/v1/completions", json={**LONG, "prompt": "x" * 100_000}).status_code == 503
        assert time.monotonic() - began < 0.25
        assert client.get("/readyz").status_code == 200, "busy is not unready"
        assert first.result().status_code == 200
        wait_for(lambda: at_rest(server))


def test_what_can_never_fit_is_the_clients_fault(engine: Any) -> None:
    with RunningServer(engine, max_num_queued_reqs=4, max_num_queued_tokens=10) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={**LONG, "n": 5})
        assert answer.status_code == 400
        assert "at most 4 on this server, got 5" in answer.json()["error"]["message"]
        alone = httpx.post(f"{server.url}/v1/completions", json={**LONG, "prompt": "fox " * 30})
        assert alone.status_code == 200
        wait_for(lambda: at_rest(server))


def test_token_backlog(engine: Any) -> None:
    with RunningServer(engine, max_num_queued_tokens=300) as server, slow_steps(engine, 0.05):
        body = {"prompt": "the quick brown fox " * 8, "max_tokens": 2}
        answers = together(12, lambda: httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))
        assert {answer.status_code for answer in answers} == {200, 503}
        assert any("prompt tokens" in answer.text for answer in answers if answer.status_code == 503)
        wait_for(lambda: at_rest(server))


def test_share_of_one_key(engine: Any) -> None:
    with RunningServer(engine, api_key=("a", "b"), max_requests_per_key=2) as server, slow_steps(engine, 0.02):

        def ask(key: str) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.post(f"{server.url}/v1/completions", json=LONG, headers=headers, timeout=60)

        with ThreadPoolExecutor(8) as pool:
            first = [pool.submit(ask, "a") for _ in range(6)]
            other = pool.submit(ask, "b")
            answers = [future.result() for future in first]
            assert other.result().status_code == 200
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 4
        assert all(answer.json()["error"]["type"] == "RateLimitError" for answer in refused)
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        wait_for(lambda: at_rest(server))
