"""From a body's bytes to a checked request model: bounded, strict JSON, then pydantic, then names of unknown fields.

JSON here has no NaN or infinity, no duplicate keys, no lone surrogates and a bounded depth, so nothing odd can travel on.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request

from quire.errors import InvalidRequest
from quire.server.schema.base import RequestBody

MAX_DEPTH = 32
SMALL_BODY = 64 << 10
"""Bytes below which parsing on the event loop is cheaper than a change of thread."""

Body = TypeVar("Body", bound=RequestBody)


def json_body(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A FastAPI dependency that reads the request's body as `model`."""

    async def read(request: Request) -> Body:
        raw = await request.body()
        unknown = request.app.state.options.unknown_fields

        def work() -> Body:
            return model.read(parse(raw), unknown)

        return work() if len(raw) <= SMALL_BODY else await asyncio.to_thread(work)

    return read


def described(model: type[RequestBody]) -> dict[str, Any]:
    """The body's entry in /openapi.json, which FastAPI cannot see, as the body is read here."""
    schema = model.model_json_schema()
    inner = schema.pop("$defs", {})

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).removeprefix("#/$defs/")
            return inner[name] if name in inner else {key: filled(value) for key, value in node.items()}
        return [filled(item) for item in node] if isinstance(node, list) else node

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": filled(schema)}}}}


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`, or InvalidRequest."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body must be UTF-8, byte {error.start} is not.") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_float)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body must be JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except RecursionError:
        raise InvalidRequest(f"the body must be nested at most {MAX_DEPTH} levels deep.") from None
    except InvalidRequest:
        raise
    except ValueError:  # an integer of thousands of digits
        raise InvalidRequest("the body holds a number with too many digits.") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {_kind(value)}.")
    _check_depth(value)
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequest(f"the key {twice[:100]!r} appears twice in one object.", parameter=twice[:100])
    return made


def _refuse_constant(name: str) -> None:
    raise InvalidRequest(f"the body must be JSON, which has no {name}.")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequest(f"the body holds a number beyond the range of a float: {text[:40]}.")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"the body must be nested at most {MAX_DEPTH} levels deep.")
        inner: list[Any] = []
        for container in level:
            items = container.values() if type(container) is dict else container
            inner += [item for item in items if type(item) is dict or type(item) is list]
        level = inner


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("the body holds half of a surrogate pair, which is no character.") from None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
