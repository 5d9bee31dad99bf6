"""The outermost layer: a request id, bounded headers, an answer to every error, one log line and one count a request."""

from __future__ import annotations

import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.errors import QuireError
from quire.log import logger
from quire.server import errors
from quire.server.errors import ClientGone, HttpError
from quire.server.options import ServerOptions

if TYPE_CHECKING:
    from quire.service.application import Application

log = logger(__name__)

CLIENT_CLOSED = 499
"""nginx's number for a client that left; it appears in the log only."""
_QUIET = ("/livez", "/readyz", "/health", "/metrics")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")


class Edge:
    """Wraps every request, good or bad."""

    def __init__(self, app: ASGIApp, application: Application, options: ServerOptions) -> None:
        self._app, self._application, self._options = app, application, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                kept = [(name, value) for name, value in message.get("headers", []) if name != b"x-request-id"]
                message["headers"] = [*kept, (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check_headers(scope)
            await self._app(scope, receive, tagged)
        except ClientGone:
            status = CLIENT_CLOSED
        except Exception as error:
            if status:
                raise
            if not isinstance(error, (HttpError, QuireError)):
                log.exception("request %s failed", request_id)
            await errors.response(error, request_id)(scope, receive, tagged)
        finally:
            self._note(scope, status or CLIENT_CLOSED, time.perf_counter() - began, request_id)

    def _check_headers(self, scope: Scope) -> None:
        headers = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers) + len(scope.get("raw_path") or b"")
        if len(headers) > self._options.max_headers:
            raise HttpError(431, f"a request may have {self._options.max_headers} header lines, got {len(headers)}.")
        if size > self._options.max_header_bytes:
            raise HttpError(431, f"a request's head may have {self._options.max_header_bytes} bytes, got {size}.")

    def _note(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "other")
        metrics = self._application.metrics
        if metrics is not None:
            metrics.http_request(route, status)
        facts = "".join(f" {name}={value}" for name, value in scope["state"].get("facts", {}).items())
        level = 10 if route in _QUIET else 20
        log.log(level, "%s %s %d %.3fs id=%s%s", scope["method"], route, status, seconds, request_id, facts)


def _request_id(scope: Scope) -> str:
    """The client's id if it is a plain word, else one of ours."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return uuid.uuid4().hex
