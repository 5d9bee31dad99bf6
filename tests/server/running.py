"""A real server in this process: uvicorn on a free port of 127.0.0.1, in a thread with its own event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from quire.server.app import build_app
from quire.server.listening import address, listen
from quire.server.options import ServerOptions
from quire.server.serve import QuietServer, uvicorn_config
from quire.service.application import Application


class RunningServer:
    """Serves `engine` between `with` and its end."""

    def __init__(self, engine: Any, **options: Any) -> None:
        self.options = ServerOptions(port=0, **options)
        self.app = build_app(engine, self.options)
        self.application: Application = self.app.state.application
        self.listening = listen(self.options)
        self.url = address(self.options, self.listening)
        self.port: int = self.listening.getsockname()[1]
        self._server = QuietServer(uvicorn_config(self.app, self.options))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[self.listening])))

    def __enter__(self) -> RunningServer:
        self._thread.start()
        wait_for(lambda: self._server.started)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Until `condition` holds; fails if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def at_rest(server: RunningServer) -> bool:
    """Nothing admitted, nothing running, no block in use."""
    engine, admission = server.application.engine, server.application.admission
    heartbeat = engine.heartbeat()
    return (
        not (heartbeat.running or heartbeat.waiting or admission.samples or admission.backlog_tokens)
        and engine.metrics.value("vllm:kv_cache_usage_perc") == 0
        and engine.metrics.value("vllm:num_requests_running") == 0
    )


@contextmanager
def slow_steps(engine: Any, seconds: float):
    """Make every step of the engine take at least so long, so that a test can act while a request runs."""
    inner = engine._engine
    original = inner.step

    def step() -> Any:
        if inner.has_work():
            time.sleep(seconds)
        return original()

    inner.step = step
    try:
        yield
    finally:
        del inner.step
