"""API keys: everything is closed but a short list of exact paths, judged on the path as it came over the wire.

The raw path is what matters: a decoded or normalised one can look open here and mean something else to the router.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from quire.server.errors import HttpError

OPEN_PATHS = frozenset({b"/livez", b"/readyz", b"/health", b"/", b"/console/console.js", b"/console/console.css"})
"""Health for load balancers, and the console's static page, which holds no data and asks for the key itself."""


class ApiKeys:
    """Lets a request through if its path is open or it brings a key. Notes which key in the request's state."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], root_path: str = "") -> None:
        self._app = app
        self._digests = [_digest(key.encode("utf-8")) for key in keys]
        self._root = root_path.rstrip("/").encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and not self._is_open(scope):
            scope.setdefault("state", {})["key"] = self._check(scope)
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        raw = scope.get("raw_path")
        if raw is None or scope["method"] not in ("GET", "HEAD"):
            return False
        return raw.removeprefix(self._root) in OPEN_PATHS

    def _check(self, scope: Scope) -> str:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = _digest(token.strip())
        # Every key is compared, and digests of equal length, so that time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise HttpError(
                401,
                "a valid API key is needed: send it as 'Authorization: Bearer KEY'.",
                {"www-authenticate": "Bearer"},
            )
        return digest.hex()[:8]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
