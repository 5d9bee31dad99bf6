"""The HTTP application: layers and routes put together. Building it starts nothing."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import quire
from quire.config import EngineConfig
from quire.server import errors
from quire.server.middleware.edge import Edge
from quire.server.middleware.intake import Intake
from quire.server.middleware.keys import ApiKeys
from quire.server.options import ServerOptions
from quire.server.routes import (
    adapters,
    chat,
    completions,
    console,
    files,
    fine_tuning,
    health,
    metrics,
    models,
    tokenize,
    uploads,
)
from quire.service.adapters import Adapters
from quire.service.application import Application
from quire.service.fine_tuning import FineTuning

_GROUPS = (health, models, completions, chat, tokenize, adapters, files, uploads, fine_tuning, metrics, console)


def build_app(engine: Any, options: ServerOptions) -> FastAPI:
    """The application over `engine`; None if it is still loading (`app.state.application.attach` follows then)."""
    application = Application(
        options.limits, options.served_model_name, fine_tuning=_fine_tuning(options), adapters=Adapters(options.adapters)
    )
    if engine is not None:
        application.attach(engine)
    app = FastAPI(title="Quire", version=quire.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.application, app.state.options = application, options
    for group in _GROUPS:
        app.include_router(group.router)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_error)
    # The last one added is the outermost.
    app.add_middleware(Intake, application=application, options=options)
    if options.api_key:
        app.add_middleware(ApiKeys, keys=options.api_key, root_path=options.root_path)
    app.add_middleware(Edge, application=application, options=options)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.allowed_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _fine_tuning(options: ServerOptions) -> FineTuning | None:
    folder = options.data_folder
    if folder is None:
        return None
    return FineTuning(
        folder,
        latency_budget=options.training_latency_budget / 1000,
        most_training=options.max_training_jobs,
        most_unfinished=options.max_queued_jobs,
        most_bytes=options.max_parts_bytes,
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 404:
        error = HTTPException(404, f"there is no {request.method} {request.url.path[:200]} here.")
    return errors.response(error, request.state.request_id)


def serve(engine_config: EngineConfig, options: ServerOptions) -> None:
    """Serve until a signal; see quire/server/serve.py."""
    from quire.server.serve import serve as run

    run(engine_config, options)
