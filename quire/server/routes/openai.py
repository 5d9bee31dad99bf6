"""What the routes of files and fine-tuning share: errors and pages in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from quire.errors import InvalidRequest, QuireError
from quire.server import errors
from quire.service.files import Page
from quire.service.fine_tuning import FineTuning


class OpenAIRoute(APIRoute):
    """A route whose errors carry OpenAI's type, param and code."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except QuireError as error:
                if error.status == 500:
                    raise
                return errors.openai_response(error, request.state.request_id)

        return handle


def fine_tuning_of(request: Request) -> FineTuning:
    """Files and jobs of this server, or an error that says how to have them."""
    return request.app.state.application.fine_tuning_or_refusal()


def owner_of(request: Request) -> str:
    """Whose files and jobs are seen: the API key's; a server without keys has one owner."""
    return getattr(request.state, "key", "")


def limit_of(request: Request, default: int, most: int) -> int:
    """The query's `limit`."""
    text = request.query_params.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or not 1 <= int(text) <= most:
        raise InvalidRequest(f"limit must be in [1, {most}], got {text[:40]!r}.", parameter="limit")
    return int(text)


def after_of(request: Request) -> str | None:
    """The query's `after`: the id behind which the page begins."""
    return request.query_params.get("after") or None


def listed(page: Page, shown: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A page as clients read it: they ask again with `after` while `has_more` holds."""
    data = [shown(item) for item in page.items]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": page.has_more,
    }
