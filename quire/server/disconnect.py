"""Noticing that a client has gone while its answer is still being computed.

Knows ASGI's `receive` only. Cancelling the work is enough: the generation aborts itself in the engine when it is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from quire.server.errors import ClientGone

Result = TypeVar("Result")


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; if the client goes first, `work` is cancelled and ClientGone raised."""
    working = asyncio.create_task(work)
    going = asyncio.create_task(until_gone(request.receive))
    try:
        await asyncio.wait((working, going), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        await stop(working, going)


async def stop(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
