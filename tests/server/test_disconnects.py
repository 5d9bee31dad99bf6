"""A client that goes away ends its work in the engine at once, streaming or not, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import threading
import time
from typing import Any

import httpx
import pytest

from tests.server.running import RunningServer, at_rest, slow_steps, wait_for

LONG = {"prompt": "the quick brown fox", "max_tokens": 400, "ignore_eos": True, "temperature": 1.0}


def send(server: RunningServer, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(head.encode() + raw)
    return connection


def running(server: RunningServer) -> int:
    heartbeat = server.application.engine.heartbeat()
    return heartbeat.running + heartbeat.waiting


def leave(connection: socket.socket, *, reset: bool) -> None:
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"prompt": ["a", "b"]}, {"use_beam_search": True, "n": 2}], ids=str)
def test_leaving_aborts_promptly(server: RunningServer, engine: Any, stream: bool, reset: bool, extra: dict[str, Any]) -> None:
    if stream and "use_beam_search" in extra:
        pytest.skip("beams are not streamed")
    wait_for(lambda: at_rest(server))
    aborted = engine.metrics.value("vllm:request_success_total", finished_reason="abort")
    with slow_steps(engine, 0.02):
        connection = send(server, {**LONG, **extra, "stream": stream})
        if stream:
            assert connection.recv(100)
        wait_for(lambda: running(server) > 0)
        left = time.monotonic()
        leave(connection, reset=reset)
        wait_for(lambda: at_rest(server), 2.0)
        assert time.monotonic() - left < 2.0
    assert engine.metrics.value("vllm:request_success_total", finished_reason="abort") > aborted


def test_leaving_while_waiting_in_the_queue(server: RunningServer, engine: Any) -> None:
    with slow_steps(engine, 0.02):
        connections = [send(server, {**LONG, "stream": bool(number % 2)}) for number in range(20)]
        wait_for(lambda: engine.heartbeat().waiting > 0)
        for connection in reversed(connections):
            leave(connection, reset=False)
        wait_for(lambda: at_rest(server), 3.0)


def test_a_storm_leaves_the_counters_at_rest(server: RunningServer, engine: Any) -> None:
    """Clients of every kind that leave at every moment, beside one that stays and must not notice."""
    random.seed(5)
    asked = {"prompt": "lazy dog", "max_tokens": 60, "ignore_eos": True, "seed": 11, "logprobs": 1}
    expected = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()["choices"]
    seen: list[Any] = []

    def stay() -> None:
        for _ in range(3):
            seen.append(httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120).json()["choices"])

    def storm(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(12):
            body = {**LONG, "n": dice.choice([1, 2]), "stream": dice.random() < 0.5, "prompt": "fox " * dice.randint(1, 40)}
            connection = send(server, body)
            time.sleep(dice.random() * 0.15)
            if dice.random() < 0.3:
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    connection.recv(200)
            leave(connection, reset=dice.random() < 0.5)

    threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(6)] + [threading.Thread(target=stay)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert seen == [expected] * 3
    wait_for(lambda: at_rest(server), 5.0)
    assert httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()["choices"] == expected


def test_a_reader_that_does_not_read_is_cut_off(engine: Any) -> None:
    """Its request is aborted although the client keeps its side open."""
    with RunningServer(engine, stream_buffer_bytes=20_000) as server:
        # The kernel's own buffers would hide an unread stream of this size.
        server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        aborted = engine.metrics.value("vllm:request_success_total", finished_reason="abort")
        connection = send(server, {**LONG, "max_tokens": 480, "n": 4, "logprobs": 10, "stream": True})
        wait_for(lambda: running(server) > 0)
        wait_for(lambda: at_rest(server), 30.0)
        assert engine.metrics.value("vllm:request_success_total", finished_reason="abort") == aborted + 4
        connection.close()
