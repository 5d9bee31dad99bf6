"""Errors as OpenAI bodies: {"error": {"message", "type", "param", "code"}}.

Every error that leaves the server passes through here, so that paths and addresses are stripped in one place and a fault of
ours never shows its details.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from quire.errors import AdapterError, InvalidRequest, NotFound, QuireError

MAX_MESSAGE = 2000
DONT_RETRY = {"x-should-retry": "false"}

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    431: "RequestHeaderFieldsTooLargeError",
    500: "InternalServerError",
}
_PATH = re.compile(r"(?<![\w.:/])(?:/[\w.+@~ -]*[\w.+@~-]){2,}/?")
_ADDRESS = re.compile(r"(?: at)? 0x[0-9a-fA-F]{4,}")


class HttpError(Exception):
    """A refusal that only HTTP knows: wrong method, too large, too slow, no key."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


class ClientGone(Exception):
    """The client has closed the connection; there is nobody to answer."""


def body(status: int, message: str, kind: str | None = None, param: str | None = None) -> dict[str, Any]:
    """One error body."""
    kind = kind or _TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return {"error": {"message": stripped(message), "type": kind, "param": param, "code": status}}


def describe(error: BaseException, request_id: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, body, headers) of any exception."""
    if isinstance(error, HttpError):
        return error.status, body(error.status, error.message), error.headers
    if isinstance(error, HTTPException):
        return error.status_code, body(error.status_code, str(error.detail)), dict(error.headers or {})
    if isinstance(error, QuireError) and error.status != 500:
        param = error.parameter if isinstance(error, (InvalidRequest, NotFound, AdapterError)) else None
        return error.status, body(error.status, str(error), error.type, param), _headers_of(error)
    message = f"The server failed to answer; the details are in its log under request id {request_id}."
    return 500, body(500, message), {}


def _headers_of(error: QuireError) -> dict[str, str]:
    wait = getattr(error, "retry_after", None)
    if wait is not None:
        return {"retry-after": str(min(60, max(1, math.ceil(wait))))}
    # OpenAI's clients retry every 5xx; what will fail again must say so.
    return dict(DONT_RETRY) if error.status >= 500 else {}


def response(error: BaseException, request_id: str) -> Response:
    """The answer to a request that ended in `error`."""
    status, content, headers = describe(error, request_id)
    return JSONResponse(content, status, headers={**headers, "x-request-id": request_id})


def openai_response(error: QuireError, request_id: str) -> Response:
    """The answer in OpenAI's own words, as clients of files and fine-tuning read them: type, param and code of the fault."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    param = error.parameter if isinstance(error, (InvalidRequest, NotFound, AdapterError)) else None
    message = stripped(getattr(error, "message", None) or str(error))
    content = {"error": {"message": message, "type": kind, "param": param, "code": error.code}}
    return JSONResponse(content, error.status, headers={**_headers_of(error), "x-request-id": request_id})


def stripped(message: str) -> str:
    """Without absolute paths and object addresses, which tell about the machine and not about the request."""
    message = _ADDRESS.sub("", _PATH.sub(_last_part, message))
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."


def _last_part(match: re.Match[str]) -> str:
    path = match.group()
    return path if path.startswith("/v1/") else path.rstrip("/").rsplit("/", 1)[-1]
