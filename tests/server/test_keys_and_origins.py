"""API keys are judged on the raw path and closed by default; web origins are let in only by name."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from quire.errors import ConfigError
from quire.server.options import ServerOptions
from tests.server.running import RunningServer

KEYS = ("first-key", "second-kéy")


@pytest.fixture(scope="module")
def locked(engine: Any) -> Iterator[RunningServer]:
    with RunningServer(engine, api_key=KEYS, allowed_origins=("http://app.example",)) as running:
        yield running


def status_of(server: RunningServer, target: str, *headers: str, method: str = "GET") -> int:
    """Over a raw socket, so that no client tidies the path."""
    lines = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", *headers]
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(connection.recv(65536).split()[1])


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/"])
def test_open_paths(locked: RunningServer, path: str) -> None:
    assert status_of(locked, path) == 200


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models", "//v1/models", "/V1/models", "/v1/models/", "/v1/./models", "/livez/../v1/models", "/%76%31/models",
        "/v1%2fmodels", "/metrics", "/version", "/tokenize", "/openapi.json", "/docs", "/v1/limits", "/v1/presets",
        "/livez%2f..%2fv1/models", "/livez;/v1/models", "/health/", "/readyz/x", "http://x/v1/models", "/nothing",
        "http://x/livez", "/livez%00",
    ],
)  # fmt: skip
def test_everything_else_is_closed(locked: RunningServer, target: str) -> None:
    assert status_of(locked, target) == 401


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer wrong",
        "Authorization: Bearer ",
        "Authorization: Bearer",
        "Authorization: first-key",
        "Authorization: Basic first-key",
        "Authorization: Bearer first-key2",
        "Authorization: Bearer first-ke",
        "Authorization: Bearer FIRST-KEY",
        "X-Api-Key: first-key",
        "Authorization: Bearer first-key\r\nAuthorization: Bearer wrong",
    ],
)
def test_wrong_keys(locked: RunningServer, header: str) -> None:
    assert status_of(locked, "/v1/models", header) == 401


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_right_keys(locked: RunningServer, key: str, scheme: str) -> None:
    assert status_of(locked, "/v1/models", f"Authorization: {scheme} {key}") == 200


def test_open_paths_are_open_for_reading_only(locked: RunningServer) -> None:
    assert status_of(locked, "/livez", method="POST") == 401
    assert status_of(locked, "/livez", method="HEAD") == 200


def test_the_refusal_is_an_openai_error(locked: RunningServer) -> None:
    answer = httpx.get(f"{locked.url}/v1/models")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "AuthenticationError"


def test_origins(locked: RunningServer, server: RunningServer) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    named = httpx.options(f"{locked.url}/v1/chat/completions", headers={"Origin": "http://app.example", **ask})
    assert named.status_code == 200
    assert named.headers["access-control-allow-origin"] == "http://app.example"
    other = httpx.options(f"{locked.url}/v1/chat/completions", headers={"Origin": "http://evil.example", **ask})
    assert "access-control-allow-origin" not in other.headers
    refused = httpx.get(f"{locked.url}/v1/models", headers={"Origin": "http://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "http://app.example"
    off = httpx.options(f"{server.url}/v1/chat/completions", headers={"Origin": "http://app.example", **ask})
    assert off.status_code == 405
    assert "access-control-allow-origin" not in off.headers


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://127.0.0.1:8000", 200),
        ("http://localhost:3000", 200),
        ("http://[::1]:8000", 200),
        ("http://evil.example", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("null", 403),
    ],
)
def test_a_foreign_page_cannot_use_a_server_without_a_key(server: RunningServer, origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"origin": origin}
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}, headers=headers)
    assert answer.status_code == status


def test_root_path_of_a_proxy(engine: Any) -> None:
    with RunningServer(engine, api_key=("k",), root_path="/llm") as running:
        assert status_of(running, "/livez") == 200
        assert status_of(running, "/v1/models") == 401
        assert status_of(running, "/v1/models", "Authorization: Bearer k") == 200


def test_a_public_address_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="without a key"):
            ServerOptions(host=host)
        ServerOptions(host=host, api_key=("k",))
        ServerOptions(host=host, insecure=True)
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.3.2.1"):
        ServerOptions(host=host)
    ServerOptions(host="0.0.0.0", uds="/tmp/quire.sock")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 70000}, "port must be in"),
        ({"api_key": ("",)}, "api_key must be a list of strings that are not empty"),
        ({"api_key": "abc"}, "api_key must be a list"),
        ({"unknown_fields": "maybe"}, "unknown_fields must be one of error, warn, ignore"),
        ({"root_path": "x"}, "root_path must begin with a slash"),
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs must be a whole number of at least 1"),
        ({"shutdown_timeout": -1.0}, "shutdown_timeout must not be negative"),
        ({"body_timeout": 0}, "body_timeout must be greater than zero"),
        ({"ssl_keyfile": "a"}, "must be given together"),
        ({"ssl_keyfile": "a", "ssl_certfile": "b"}, "ssl_keyfile must be a file"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerOptions(**options)
