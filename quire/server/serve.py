"""One server from start to stop: take the port, load the model, serve, drain on a signal.

SIGTERM or Ctrl-C: not ready at once; new requests are taken for `drain_grace` more seconds and then refused; running ones get
`shutdown_timeout` seconds; what is left is aborted with an error that says so; the process ends with 0. A second signal
skips the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from quire.config import EngineConfig
from quire.errors import EngineDead, Unavailable
from quire.log import logger
from quire.log import setup as setup_log
from quire.server.app import build_app
from quire.server.listening import address, listen
from quire.server.options import ServerOptions
from quire.server.protocol import protocol_class
from quire.service.application import Application
from quire.service.lifecycle import Stage

log = logger(__name__)

IDLE_CONNECTION_SECONDS = 30
ABORT_SECONDS = 5.0
"""Time for aborted requests to send their error."""
DEAD_ENGINE_SECONDS = 5.0
"""Time in which a server without an engine still tells its clients so."""
LARGEST_HEAD = 1 << 20
"""Where parsing stops; the limit that clients see is ServerOptions.max_header_bytes."""


def serve(engine_config: EngineConfig, options: ServerOptions) -> None:
    """Serve until a signal. Raises ConfigError, DoesNotFit or ModelError if the start fails, EngineDead if the engine dies."""
    setup_log()
    _adopt_log_of_uvicorn()
    listening = listen(options)
    try:
        asyncio.run(_Serving(engine_config, options, listening).run())
    finally:
        listening.close()
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)


class QuietServer(uvicorn.Server):
    """uvicorn without its own signal handlers: draining is more than closing connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Serving:
    def __init__(self, engine_config: EngineConfig, options: ServerOptions, listening: socket.socket) -> None:
        self._engine_config, self._options, self._listening = engine_config, options, listening
        self._signals = 0
        self._signalled = asyncio.Event()
        self._hurried = asyncio.Event()

    async def run(self) -> None:
        app = build_app(None, self._options)
        application: Application = app.state.application
        server = QuietServer(uvicorn_config(app, self._options))
        self._handle_signals()
        serving = asyncio.create_task(server.serve(sockets=[self._listening]))
        log.info("listening on %s, loading %s", address(self._options, self._listening), self._engine_config.model)
        try:
            if await self._load(application):
                await self._serve(application)
        finally:
            application.lifecycle.close_door()
            server.should_exit = True
            await serving
            application.shutdown()
        log.info("stopped")

    async def _load(self, application: Application) -> bool:
        """Load the engine on a thread of its own; False if a signal came first."""
        began = time.monotonic()
        loading = _on_thread(application.load, self._engine_config)
        signalled = asyncio.create_task(self._signalled.wait())
        try:
            while not loading.done():
                await asyncio.wait((loading, signalled), timeout=5.0, return_when=asyncio.FIRST_COMPLETED)
                if signalled.done():
                    return False
                if not loading.done():
                    log.info("still loading (%.0f s)", time.monotonic() - began)
        finally:
            signalled.cancel()
        application.attach(loading.result())
        log.info("loaded in %.1f s", time.monotonic() - began)
        self._tell(application)
        return True

    async def _serve(self, application: Application) -> None:
        while not self._signalled.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._signalled.wait(), 1.0)
            if not application.alive():
                log.error("the engine has died; the server ends in %.0f s", DEAD_ENGINE_SECONDS)
                await asyncio.sleep(DEAD_ENGINE_SECONDS)
                raise EngineDead("the engine has died; its log above says why.")
        await self._drain(application)

    async def _drain(self, application: Application) -> None:
        application.lifecycle.advance(Stage.DRAINING)
        log.info("draining: %d requests in progress", application.admission.samples)
        await self._pause(self._options.drain_grace)
        application.lifecycle.close_door()
        if not await self._until_idle(application, self._options.shutdown_timeout, self._hurried):
            reason = Unavailable("the server is shutting down and this request took too long to finish.", retry_after=10.0)
            log.warning("aborting %d requests that are not finished", application.abort_all(reason))
            await self._until_idle(application, ABORT_SECONDS, None)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurried.wait(), seconds)

    async def _until_idle(self, application: Application, seconds: float, hurry: asyncio.Event | None) -> bool:
        deadline = time.monotonic() + seconds
        while application.admission.samples:
            if time.monotonic() >= deadline or (hurry is not None and hurry.is_set()):
                return False
            await asyncio.sleep(0.02)
        return True

    def _handle_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # a server inside another program: the program handles its signals
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self._signals += 1
        self._signalled.set()
        if self._signals > 1:
            self._hurried.set()

    def _tell(self, application: Application) -> None:
        """The banner: where it listens, how to try it, what it can hold."""
        url, name, plan = address(self._options, self._listening), application.model_names[0], application.engine.plan
        key = ' -H "Authorization: Bearer $QUIRE_API_KEY"' if self._options.api_key else ""
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}], "stream": True})
        place = f"--unix-socket {self._options.uds} http://localhost" if self._options.uds else url
        log.info("ready: %s serves %s", url, name)
        log.info(
            "capacity: %s KV tokens, %.1f requests of %s tokens at once, up to %d sequences a step",
            f"{plan.kv_tokens:,}",
            plan.max_concurrency,
            f"{plan.max_model_len:,}",
            plan.max_num_seqs,
        )
        log.info("try:  curl -N %s/v1/chat/completions -H 'Content-Type: application/json'%s -d '%s'", place, key, body)


def uvicorn_config(app: Any, options: ServerOptions) -> uvicorn.Config:
    """uvicorn's settings for one application."""
    return uvicorn.Config(
        app,
        http=protocol_class(options),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        root_path=options.root_path,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        timeout_keep_alive=IDLE_CONNECTION_SECONDS,
        timeout_graceful_shutdown=int(ABORT_SECONDS),
        h11_max_incomplete_event_size=LARGEST_HEAD,
    )


def _adopt_log_of_uvicorn() -> None:
    """uvicorn's warnings in Quire's format; its news repeat ours."""
    theirs = logging.getLogger("uvicorn")
    theirs.handlers, theirs.propagate = logging.getLogger("quire").handlers, False
    theirs.setLevel(logging.WARNING)


def _on_thread(work: Any, *arguments: Any) -> asyncio.Future[Any]:
    """Run `work` on a daemon thread: a signal while loading must not wait for the load to end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work(*arguments)
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="quire-load", daemon=True).start()
    return future
