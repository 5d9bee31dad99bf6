"""Bodies and heads that are too large, too slow or not HTTP at all, over raw sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.running import RunningServer, at_rest, wait_for

GOOD = json.dumps({"prompt": "the quick", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def strict(engine: Any) -> Iterator[RunningServer]:
    """A server with short patience."""
    with RunningServer(
        engine, max_body_bytes=100_000, body_idle_timeout=0.4, body_timeout=1.5, header_timeout=0.6, max_headers=20
    ) as running:
        yield running
        wait_for(lambda: at_rest(running))


def connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def answer_of(connection: socket.socket) -> tuple[int, str]:
    """(status, whole text) of an answer after which the server closes or nothing follows."""
    data = b""
    while True:
        try:
            part = connection.recv(65536)
        except (TimeoutError, ConnectionResetError):
            break
        if not part:
            break
        data += part
        head, _, body = data.partition(b"\r\n\r\n")
        length = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
        if length and len(body) >= length[0]:
            break
    return int(data.split()[1]), data.decode()


def still_serves(server: RunningServer) -> None:
    assert httpx.post(f"{server.url}/v1/completions", content=GOOD, headers={"content-type": "application/json"}).is_success


@pytest.mark.parametrize("size", [150_000, 350_000])
def test_announced_length_is_refused(strict: RunningServer, size: int) -> None:
    answer = httpx.post(
        f"{strict.url}/v1/completions", content=b" " * size, headers={"content-type": "application/json"}, timeout=20
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "the body may have 100000 bytes."
    assert answer.headers["connection"] == "close"
    still_serves(strict)


def test_announced_length_with_expect_is_refused_without_reading(strict: RunningServer) -> None:
    with connect(strict) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n")
        status, text = answer_of(connection)
    assert status == 413
    assert "100 Continue" not in text
    still_serves(strict)


def test_chunked_body_is_counted(strict: RunningServer) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(150):
            yield b" " * 1000

    answer = httpx.post(f"{strict.url}/v1/completions", content=parts(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    still_serves(strict)


def test_silent_body(strict: RunningServer) -> None:
    with connect(strict) as connection:
        began = time.monotonic()
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        status, text = answer_of(connection)
    assert status == 408
    assert time.monotonic() - began < 1.4
    assert "too slowly" in text
    still_serves(strict)


def test_dribbled_body(strict: RunningServer) -> None:
    with connect(strict) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        began = time.monotonic()

        def dribble() -> None:
            with contextlib.suppress(OSError):
                for _ in range(100):
                    connection.sendall(b" ")
                    time.sleep(0.1)

        sender = threading.Thread(target=dribble, daemon=True)
        sender.start()
        status, _ = answer_of(connection)
    assert status == 408
    assert 1.0 < time.monotonic() - began < 3.0
    still_serves(strict)


def test_slow_head(strict: RunningServer) -> None:
    with connect(strict) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n")
        for _ in range(4):
            time.sleep(0.1)
            connection.sendall(b"X-A: 1\r\n")
        status, text = answer_of(connection)
    assert status == 408
    assert json.loads(text.split("\r\n\r\n", 1)[1])["error"]["code"] == 408


def test_silent_connection_is_closed(strict: RunningServer) -> None:
    with connect(strict) as connection:
        assert connection.recv(10) == b""


def test_a_kept_connection_serves_again_after_a_pause(strict: RunningServer) -> None:
    with connect(strict) as connection:
        for _ in range(2):
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD)
            assert answer_of(connection)[0] == 200
            time.sleep(0.9)


def test_too_many_and_too_long_headers(strict: RunningServer) -> None:
    for headers in ({f"x-{index}": "1" for index in range(30)}, {"x-long": "y" * 70_000}):
        answer = httpx.get(f"{strict.url}/livez", headers=headers)
        assert answer.status_code == 431
        assert answer.json()["error"]["type"] == "RequestHeaderFieldsTooLargeError"
    with connect(strict) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"y" * (3 << 20))
        status, _ = answer_of(connection)
    assert status == 431


def test_not_http(strict: RunningServer) -> None:
    with connect(strict) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, text = answer_of(connection)
    assert status == 400
    assert json.loads(text.split("\r\n\r\n", 1)[1])["error"]["message"] == "the request is not valid HTTP."
    still_serves(strict)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_content_type(strict: RunningServer, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = httpx.post(f"{strict.url}/v1/completions", content=GOOD, headers=headers)
    assert answer.status_code == 415
    assert "content-type must be application/json" in answer.json()["error"]["message"]
    with_charset = httpx.post(
        f"{strict.url}/v1/completions", content=GOOD, headers={"content-type": "application/json; charset=utf-8"}
    )
    assert with_charset.status_code == 200


def test_client_that_leaves_in_the_middle_of_its_body(strict: RunningServer) -> None:
    for _ in range(5):
        with connect(strict) as connection:
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    wait_for(lambda: at_rest(strict))
    still_serves(strict)


def test_pipelined_requests(strict: RunningServer) -> None:
    with connect(strict) as connection:
        one = HEAD + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD
        connection.sendall(one + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline, data = time.monotonic() + 5, b""
        while b"alive" not in data and time.monotonic() < deadline:
            data += connection.recv(65536)
        assert b"text_completion" in data
        assert b"alive" in data
