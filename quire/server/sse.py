"""A stream of JSON objects as server-sent events, with a bounded buffer between the engine and the reader.

Two tasks: one takes events from the generation at its own speed and buffers frames, one writes them. So a slow reader never
slows the engine, and one that is too slow is cut off. `[DONE]` ends every stream, also one that failed half-way; a failure
before the first event is raised instead, so that it becomes a plain error answer. Knows nothing of what the events hold.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.errors import QuireError
from quire.log import logger
from quire.server import errors
from quire.server.disconnect import stop, until_gone
from quire.server.errors import ClientGone, HttpError
from quire.server.options import ServerOptions

log = logger(__name__)

FIRST_EVENT_SECONDS = 1.0
"""How long a failure may take and still become an error answer; later the stream is opened and silence is filled."""
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def frame(event: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A response that is written while it is computed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], options: ServerOptions, request_id: str) -> None:
        super().__init__(None, 200, HEADERS, self.media_type)
        del self.headers["content-length"]
        self._events, self._options, self._request_id = events, options, request_id
        self._frames: list[bytes] = []
        self._unread = 0
        self._news = asyncio.Event()
        self._opened = False
        self._ended = self._gone = self._too_slow = False
        self._failure: Exception | None = None
        self._cut_connection: Callable[[], None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._cut_connection = scope.get("state", {}).get("cut_connection")
        taking = asyncio.create_task(self._take())
        going = asyncio.create_task(until_gone(receive))
        going.add_done_callback(self._note_gone)
        try:
            await self._wait(FIRST_EVENT_SECONDS)
            if self._failure is not None:
                raise self._failure
            self._opened = True
            await self._write(send)
        finally:
            await stop(taking, going)
        if self._gone or self._too_slow:
            raise ClientGone

    async def _take(self) -> None:
        """Buffer frames until the events end, fail, or nobody reads them."""
        try:
            async with aclosing(self._events) as events:  # type: ignore[type-var]
                async for event in events:
                    self._put(frame(event))
                    if self._too_slow:
                        return
        except Exception as error:
            self._fail(error)
        self._put(DONE)
        self._ended = True
        self._news.set()

    def _fail(self, error: Exception) -> None:
        if not self._opened and not self._frames:
            self._failure = error
            return
        if not isinstance(error, (HttpError, QuireError)):
            log.error("request %s failed", self._request_id, exc_info=error)
        _, body, _ = errors.describe(error, self._request_id)
        self._put(frame(body))

    def _put(self, data: bytes) -> None:
        self._frames.append(data)
        self._unread += len(data)
        if self._unread > self._options.stream_buffer_bytes:
            self._cut()
        self._news.set()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while not (self._gone or self._too_slow):
            await self._wait(self._options.keep_alive_interval)
            frames, ended = b"".join(self._frames) or KEEP_ALIVE, self._ended
            try:
                async with asyncio.timeout(self._options.stream_stall_timeout):
                    self._frames.clear()
                    await send({"type": "http.response.body", "body": frames, "more_body": not ended})
            except TimeoutError:
                self._cut()
            self._unread = sum(map(len, self._frames))
            if ended:
                return

    async def _wait(self, seconds: float) -> None:
        """Until there is something to write, at most so long."""
        if not self._frames and not (self._ended or self._gone):
            self._news.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._news.wait()
            except TimeoutError:
                pass

    def _note_gone(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._gone = True
            self._news.set()

    def _cut(self) -> None:
        """Drop the connection at once: a polite close would wait for the reader that does not read, and so would a write."""
        if self._too_slow:
            return
        self._too_slow = True
        log.warning("request %s: the stream was not read in time and is cut off", self._request_id)
        if self._cut_connection is not None:
            self._cut_connection()
