"""Answers from a server that speaks OpenAI's API (Quire's own, vLLM's, ...), with the standard library's HTTP client only."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from quire.cli.answer import Answer
from quire.errors import ConfigError, InvalidRequest, Unavailable
from quire.service.requests import TextRequest

CONNECT_SECONDS = 10.0
MOST_ERROR_BYTES = 65536


class RemoteModel:
    """One model of a server. `url` with or without /v1. Raises ConfigError or Unavailable at construction."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else "http://" + url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url must be such as http://127.0.0.1:8000, got {url!r}.")
        self._parts, self._key = parts, api_key
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._base}"
        self.name = model or self._first_model()

    def stream(self, request: TextRequest, answer: Answer) -> Iterator[str]:
        """Pieces of text; closing the iterator closes the connection, upon which the server stops computing."""
        chat = request.messages is not None
        body: dict[str, Any] = {
            "model": self.name,
            **({"messages": request.messages} if chat else {"prompt": request.prompts[0]}),
            **request.sampling,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.max_tokens_default is not None:
            body.setdefault("max_tokens", request.max_tokens_default)
        if request.preset is not None:
            body["preset"] = request.preset
        connection, response = self._send("POST", "/v1/chat/completions" if chat else "/v1/completions", body)
        try:
            for event in _events(response):
                text = _read_event(event, answer, chat)
                if text:
                    answer.add(text)
                    yield text
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"the connection to {self.url} broke: {error or type(error).__name__}.") from None
        finally:
            connection.close()
            answer.end()

    def close(self) -> None:
        """Nothing is kept open between answers."""

    def _first_model(self) -> str:
        connection, response = self._send("GET", "/v1/models")
        try:
            models = json.loads(response.read()).get("data") or []
            return str(models[0]["id"])
        except (ValueError, LookupError, AttributeError):
            raise Unavailable(f"{self.url} answers, but is no OpenAI-compatible server: /v1/models lists nothing.") from None
        finally:
            connection.close()

    def _send(self, method: str, path: str, body: Any = None) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=CONNECT_SECONDS)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        try:
            connection.connect()
            connection.sock.settimeout(None)  # a long prompt takes as long as it takes
            connection.request(method, self._base + path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = "no such host" if isinstance(error, socket.gaierror) else str(error) or type(error).__name__
            raise Unavailable(f"no server at {self.url} ({reason}). Start one with 'quire serve', or check --url.") from None
        except BaseException:  # Ctrl-C while waiting
            connection.close()
            raise
        if response.status >= 400:
            try:
                raise _error(response.status, response.read(MOST_ERROR_BYTES), self.url)
            finally:
                connection.close()
        return connection, response


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    """The data of server-sent events, up to [DONE]."""
    for line in response:
        if line.startswith(b"data:"):
            data = line[5:].strip().decode("utf-8", errors="replace")
            if data == "[DONE]":
                return
            yield data


def _read_event(event: str, answer: Answer, chat: bool) -> str:
    """The new text of one event; counts go into `answer`."""
    facts = json.loads(event)
    if facts.get("error"):
        raise Unavailable(f"the server broke off: {facts['error'].get('message', facts['error'])}")
    usage = facts.get("usage") or {}
    if usage:
        answer.prompt_tokens, answer.tokens = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    text = ""
    for choice in facts.get("choices") or []:
        text += (choice.get("delta") or {}).get("content") or "" if chat else choice.get("text") or ""
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    return text


def _error(status: int, body: bytes, url: str) -> Exception:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = body.decode("utf-8", errors="replace").strip()[:200] or f"HTTP {status}"
    if status in (401, 403):
        return ConfigError(f"{url} refuses the key: {message} Give --api-key KEY (or set QUIRE_API_KEY).")
    if status < 500 and status != 429:
        return InvalidRequest(message)
    return Unavailable(f"{url} answers {status}: {message}")
