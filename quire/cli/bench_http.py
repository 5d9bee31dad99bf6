"""Streams from a server that speaks OpenAI's API, each event with the time of its arrival.

A plain HTTP/1.1 client over asyncio: on one machine the client's own work is taken from the server's, so it parses no more than
it needs. Connections are kept and used again. Knows no metrics.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from quire.errors import ConfigError, Unavailable

CONNECT_SECONDS = 30.0
MOST_LINE_BYTES = 16 << 20
MOST_ERROR_BYTES = 65_536
# Where a chat's events hold what the model wrote.
WRITTEN = ("content", "reasoning_content", "reasoning", "tool_calls")


@dataclass
class Sent:
    """One request and what came back. Times in seconds of `time.perf_counter`; `arrivals`: of every event that has a choice."""

    began: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: list[str] = field(default_factory=list)
    error: str | None = None


class Refused(Exception):
    """The server answered with an error."""


class Server:
    """Where to send to. `url` with or without /v1."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else "http://" + url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url must be such as http://127.0.0.1:8000, got {url!r}.")
        self._host, self._secure = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._secure else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._key, self._netloc = key, parts.netloc
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.url = f"{parts.scheme}://{parts.netloc}{self._base}"

    async def models(self) -> list[str]:
        """The names that the server gives its models. Raises Unavailable."""
        try:
            lines = [piece async for piece in self._exchange("GET", "/v1/models", None)]
            return [str(row["id"]) for row in json.loads(b"".join(lines))["data"]]
        except (OSError, EOFError, TimeoutError) as error:
            reason, way = str(error) or type(error).__name__, "Start one with 'quire serve', or check --base-url."
            raise Unavailable(f"no server at {self.url} ({reason}). {way}") from None
        except (Refused, ValueError, LookupError, TypeError) as error:
            raise Unavailable(f"{self.url} answers, but lists no models: {error}") from None

    async def stream(self, path: str, body: dict[str, Any]) -> Sent:
        """Send one request that streams, and note what comes. Never raises for what the server does: see `error`."""
        sent, data = Sent(), json.dumps(body).encode()
        sent.began = time.perf_counter()
        try:
            pending = b""
            async for piece in self._exchange("POST", path, data):
                now = time.perf_counter()
                *lines, pending = (pending + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:") and (event := line[5:].strip()) != b"[DONE]":
                        _read_event(json.loads(event), now, sent)
            if sent.error is None and not sent.arrivals:
                sent.error = "the stream held no text"
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            sent.error = f"{type(error).__name__}: {error}".rstrip(": ")
        except Refused as error:
            sent.error = str(error)
        return sent

    async def close(self) -> None:
        """Close the connections that wait for more."""
        while self._idle:
            self._idle.pop()[1].close()
        await asyncio.sleep(0)

    async def _exchange(self, method: str, path: str, body: bytes | None) -> AsyncIterator[bytes]:
        """Pieces of the answer's body. A connection that the server closed while it was idle is replaced."""
        while True:
            fresh = not self._idle
            reader, writer = await self._connect() if fresh else self._idle.pop()
            done = False
            try:
                try:
                    writer.write(self._head(method, path, body) + (body or b""))
                    await writer.drain()
                    status, headers = await _read_head(reader)
                except (OSError, EOFError):
                    if fresh:
                        raise
                    continue
                if status >= 400:
                    raise Refused(await _refusal(status, reader, headers))
                async for piece in _body(reader, headers):
                    yield piece
                done = headers.get("connection", "").lower() != "close" and _bounded(headers)
                return
            finally:
                if done:
                    self._idle.append((reader, writer))
                else:
                    writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = ssl.create_default_context() if self._secure else None
        async with asyncio.timeout(CONNECT_SECONDS):
            return await asyncio.open_connection(self._host, self._port, ssl=context, limit=MOST_LINE_BYTES)

    def _head(self, method: str, path: str, body: bytes | None) -> bytes:
        lines = [f"{method} {self._base}{path} HTTP/1.1", f"Host: {self._netloc}", "Accept: */*"]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        if self._key:
            lines.append(f"Authorization: Bearer {self._key}")
        return "\r\n".join([*lines, "", ""]).encode()


def _read_event(event: dict[str, Any], now: float, sent: Sent) -> None:
    if event.get("error"):
        error = event["error"]
        sent.error = str(error.get("message", error) if isinstance(error, dict) else error)
        return
    if usage := event.get("usage"):
        sent.prompt_tokens = usage.get("prompt_tokens") or sent.prompt_tokens
        sent.output_tokens = usage.get("completion_tokens") or sent.output_tokens
    for choice in event.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            sent.text.append(choice.get("text") or "")
        else:
            # The first event of a chat may name the role alone, before anything is computed.
            written = next((delta[name] for name in WRITTEN if delta.get(name)), None)
            if not written:
                continue
            sent.text.append(written if isinstance(written, str) else "")
        sent.arrivals.append(now)
        break


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    words = lines[0].split(" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        raise ValueError(f"no HTTP answer: {lines[0][:80]!r}")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(words[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


def _bounded(headers: dict[str, str]) -> bool:
    return "content-length" in headers or "chunked" in headers.get("transfer-encoding", "").lower()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        while size := int((await reader.readline()).split(b";")[0] or b"", 16):
            yield (await reader.readexactly(size + 2))[:-2]
        while (await reader.readline()).strip():
            pass  # trailers
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(1 << 16):
            yield piece


async def _refusal(status: int, reader: asyncio.StreamReader, headers: dict[str, str]) -> str:
    body = b""
    with suppress(OSError, EOFError, ValueError):
        async for piece in _body(reader, headers):
            body += piece
            if len(body) > MOST_ERROR_BYTES:
                break
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = body.decode("utf-8", errors="replace").strip()[:200]
    return f"HTTP {status}: {message}" if message else f"HTTP {status}"
