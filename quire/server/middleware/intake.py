"""What happens before a body is read: its type and length are checked, a slot is taken, and its arrival is timed.

uvicorn and Starlette bound neither the size nor the slowness of a body; this layer does. The slot is taken before the first
byte of the body is awaited and given back when the answer is out, whatever happened in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.server.errors import ClientGone, HttpError
from quire.server.options import ServerOptions, is_local
from quire.service.uploads import PART_BYTES

if TYPE_CHECKING:
    from quire.service.application import Application

CLOSE = {"connection": "close"}
MOST_DISCARDED = 4
"""A body beyond the limit is read and thrown away up to so many times the limit, because closing while the client still
sends would reset the connection and the client would never see the answer."""
DISCARD_SECONDS = 5.0
UPLOADS = ("/v1/files",)
"""Paths that take a form with a file, under a limit of their own."""
PARTS = ("/v1/uploads/", "/parts")
"""How paths begin and end that take a form with a part of a file."""
ADAPTERS = "/v1/adapters/"
"""Below it, adapters are put as forms."""
UPLOAD_SECONDS = 3600.0
FORM_BYTES = 64 << 10
"""What a form may add to its file."""
ACTIONS = ("/cancel", "/pause", "/resume")
"""Endings of paths that need no body, and so no type of one."""


class Intake:
    """Guards requests that carry a body."""

    def __init__(self, app: ASGIApp, application: Application, options: ServerOptions) -> None:
        self._app, self._application, self._options = app, application, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(self._options.root_path.rstrip("/"))
        headers = dict(scope["headers"])
        adapter = scope["method"] == "PUT" and path.startswith(ADAPTERS)
        part = path.startswith(PARTS[0]) and path.endswith(PARTS[1])
        upload = path in UPLOADS or part or adapter
        most, seconds = self._options.max_body_bytes, self._options.body_timeout
        if upload:
            whole = self._options.max_adapter_bytes if adapter else self._options.max_upload_bytes
            largest = PART_BYTES if part else whole
            most, seconds = largest + FORM_BYTES, UPLOAD_SECONDS
        body = _TimedBody(receive, self._options, most, seconds)
        await body.check_length(headers)
        if upload:
            _check_form(headers)
        elif not (path.endswith(ACTIONS) and _has_no_body(headers)):
            _check_type(headers)
        if not self._options.api_key and (upload or not self._options.insecure):
            _check_origin(headers.get(b"origin", b"").decode("latin-1"), self._options.allowed_origins)
        state = scope.setdefault("state", {})
        ticket = self._application.arrive(state.get("key", ""))
        state["ticket"] = ticket
        try:
            await self._app(scope, body.receive, send)
        finally:
            ticket.release()


def _check_type(headers: dict[bytes, bytes]) -> None:
    """JSON only: a form or plain text is what a web page can post to a local server without asking."""
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        shown = kind.decode("latin-1")[:80] or "none"
        raise HttpError(415, f"content-type must be application/json, got {shown}.")


def _check_form(headers: dict[bytes, bytes]) -> None:
    """Uploads are forms. A web page can post one without asking, so their origin is looked at on every server without keys."""
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"multipart/form-data":
        shown = kind.decode("latin-1")[:80] or "none"
        raise HttpError(415, f"content-type must be multipart/form-data, got {shown}.")


def _has_no_body(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers


def _check_origin(origin: str, allowed: Sequence[str]) -> None:
    """A server without a key is for this machine only. A foreign page that has pointed its own name at this machine passes
    the browser's checks, but it cannot hide its origin; other clients send none."""
    if origin and origin not in allowed and "*" not in allowed and not is_local(urlsplit(origin).hostname or ""):
        raise HttpError(403, "this origin is not allowed: name it with --allowed-origins, or set an API key.")


class _TimedBody:
    """ASGI's `receive` with a limit on size, silence and total time while the body comes in."""

    def __init__(self, receive: Receive, options: ServerOptions, most: int, seconds: float) -> None:
        self._receive, self._options, self._most = receive, options, most
        self._received = 0
        self._complete = False
        self._deadline = time.monotonic() + seconds

    async def check_length(self, headers: dict[bytes, bytes]) -> None:
        """Refuse a body by its announced length."""
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit():
            raise HttpError(400, "content-length must be a whole number.", CLOSE)
        if int(announced) > self._most:
            if headers.get(b"expect", b"").lower() != b"100-continue":
                await self._discard()
            raise self._too_large()

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        wait = min(self._options.body_idle_timeout, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(max(0.0, wait)):
                message = await self._receive()
        except TimeoutError:
            raise HttpError(408, "the request's body came too slowly.", CLOSE) from None
        if message["type"] != "http.request":
            raise ClientGone
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._received > self._most:
            await self._discard()
            raise self._too_large()
        return message

    async def _discard(self) -> None:
        left = MOST_DISCARDED * self._most
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                while not self._complete and left > 0:
                    message = await self._receive()
                    if message["type"] != "http.request":
                        raise ClientGone
                    left -= len(message.get("body", b""))
                    self._complete = not message.get("more_body", False)
        except TimeoutError:
            pass

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the body may have {self._most} bytes.", CLOSE)
