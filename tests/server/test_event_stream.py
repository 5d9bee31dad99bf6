"""The stream's own rules, with an event source made for each: errors half-way, silence, readers that do not read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from quire.errors import EngineDead, InvalidRequest
from quire.server.errors import ClientGone
from quire.server.options import ServerOptions
from quire.server.sse import EventStream

Send = Callable[[dict[str, Any]], Any]


class Connection:
    """The server's side of ASGI: collects what is sent; `leave` is the client's going."""

    def __init__(self, delay: float = 0.0) -> None:
        self.messages: list[dict[str, Any]] = []
        self.delay = delay
        self.left = asyncio.Event()
        self.cut = False

    async def send(self, message: dict[str, Any]) -> None:
        await asyncio.sleep(self.delay)
        self.messages.append(message)

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def run(self, stream: EventStream) -> str:
        scope = {"type": "http", "state": {"cut_connection": lambda: setattr(self, "cut", True)}}
        await stream(scope, self.receive, self.send)
        return self.text

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages).decode()


def stream_of(events: AsyncIterator[dict[str, Any]], **options: Any) -> EventStream:
    return EventStream(events, ServerOptions(**options), "id-1")


async def numbers(count: int, error: Exception | None = None, pause: float = 0.0) -> AsyncIterator[dict[str, Any]]:
    for number in range(count):
        await asyncio.sleep(pause)
        yield {"number": number}
    if error is not None:
        raise error


def test_frames_and_the_end() -> None:
    async def run() -> str:
        connection = Connection()
        text = await connection.run(stream_of(numbers(3)))
        assert connection.messages[0]["status"] == 200
        assert connection.messages[-1]["more_body"] is False
        return text

    assert asyncio.run(run()) == 'data: {"number":0}\n\ndata: {"number":1}\n\ndata: {"number":2}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (EngineDead("the engine has ended."), 503, "the engine has ended."),
        (RuntimeError("secret"), 500, "request id id-1"),
    ],
)
def test_an_error_half_way_is_an_event_and_done_follows(error: Exception, code: int, words: str) -> None:
    async def run() -> str:
        return await Connection().run(stream_of(numbers(2, error, pause=0.01)))

    frames = asyncio.run(run()).split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    told = json.loads(frames[-3].removeprefix("data: "))["error"]
    assert told["code"] == code
    assert words in told["message"]
    assert "secret" not in told["message"]


def test_an_error_before_the_first_event_is_raised() -> None:
    async def run() -> None:
        connection = Connection()
        with pytest.raises(InvalidRequest):
            await connection.run(stream_of(numbers(0, InvalidRequest("no."))))
        assert connection.messages == []

    asyncio.run(run())


def test_silence_is_filled() -> None:
    async def run() -> str:
        return await Connection().run(stream_of(numbers(2, pause=1.3), keep_alive_interval=0.1))

    text = asyncio.run(run())
    assert text.count(": keep-alive\n\n") > 3
    assert text.replace(": keep-alive\n\n", "").count("data: ") == 3


def test_leaving_closes_the_source() -> None:
    closed = []

    async def source() -> AsyncIterator[dict[str, Any]]:
        try:
            while True:
                await asyncio.sleep(0.01)
                yield {}
        finally:
            closed.append(True)

    async def run() -> None:
        connection = Connection()
        asyncio.get_running_loop().call_later(0.1, connection.left.set)
        with pytest.raises(ClientGone):
            await connection.run(stream_of(source()))
        assert not connection.cut

    asyncio.run(run())
    assert closed == [True]


@pytest.mark.parametrize("options", [{"stream_buffer_bytes": 2000}, {"stream_stall_timeout": 0.2}], ids=str)
def test_a_slow_reader_is_cut_off(options: dict[str, Any]) -> None:
    async def run() -> None:
        connection = Connection(delay=1.0)
        with pytest.raises(ClientGone):
            await connection.run(stream_of(numbers(10_000, pause=0.0005), **options))
        assert connection.cut

    asyncio.run(run())
