"""Adapters over HTTP: vLLM's two routes, and /v1/adapters to list, upload and delete."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import JSONResponse, PlainTextResponse

from quire.errors import InvalidRequest, NotFound, Overloaded
from quire.server.body import described, json_body
from quire.server.multipart import parts
from quire.server.routes.generate import application_of
from quire.server.schema.adapters import UPLOAD, LoadBody, UnloadBody
from quire.service.adapters import FILES, Adapters, Upload

router = APIRouter()
MOST_UPLOADS = 4
ON_LOOP = 64 << 10
"""Bytes below which writing to a file here is cheaper than a change of thread."""


def adapters_of(request: Request, name: str = "") -> Adapters:
    """The adapters of this server; Unavailable while it loads, Refused where none are served. What fine-tuning jobs have made
    belongs to their keys and is looked after under /v1/models: such a `name` is NotFound here."""
    application = application_of(request)
    if application.of_job(name):
        raise NotFound(f"The adapter `{name[:200]}` does not exist; names of fine-tuning jobs are under /v1/models.")
    application.engine  # noqa: B018 - raises while it loads
    _ = application.adapters.manager
    return application.adapters


@router.post("/v1/load_lora_adapter", openapi_extra=described(LoadBody))
async def load(request: Request, body: Annotated[LoadBody, Depends(json_body(LoadBody))]) -> Response:
    """Serve a folder under a name, until the server stops. vLLM's body and answer."""
    body.check()
    adapters = adapters_of(request, body.lora_name)
    await asyncio.to_thread(adapters.load, body.lora_name, body.lora_path, body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", openapi_extra=described(UnloadBody))
async def unload(request: Request, body: Annotated[UnloadBody, Depends(json_body(UnloadBody))]) -> Response:
    """Forget a name. vLLM's body and answer."""
    body.check()
    await asyncio.to_thread(adapters_of(request, body.lora_name).unload, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/v1/adapters")
async def listing(request: Request) -> dict[str, Any]:
    """All adapters."""
    adapters = adapters_of(request)
    return {
        "object": "list",
        "data": [adapters.card(name) for name in adapters.names() if not application_of(request).of_job(name)],
    }


@router.get("/v1/adapters/{name:path}")
async def one(request: Request, name: str) -> dict[str, Any]:
    """One adapter."""
    return adapters_of(request, name).card(name)


@router.put("/v1/adapters/{name:path}", openapi_extra=UPLOAD)
async def put(request: Request, name: str) -> Response:
    """Keep an adapter and serve it: 201, or 200 if it replaces one. When this is answered, it is on the disk."""
    adapters, state = adapters_of(request, name), request.app.state
    uploads = getattr(state, "adapter_uploads", 0)
    if uploads >= MOST_UPLOADS:
        raise Overloaded(f"{MOST_UPLOADS} adapters are being uploaded, which is the most at a time.", retry_after=2.0)
    state.adapter_uploads = uploads + 1
    try:
        upload = await asyncio.to_thread(adapters.begin, name)
        try:
            await _receive(request, upload)
            new = await asyncio.to_thread(adapters.keep, upload)
        finally:
            await asyncio.to_thread(upload.discard)
    finally:
        state.adapter_uploads -= 1
    return JSONResponse(adapters.card(name), 201 if new else 200)


@router.delete("/v1/adapters/{name:path}")
async def delete(request: Request, name: str) -> dict[str, Any]:
    """Forget an adapter, and its files if it was uploaded."""
    await asyncio.to_thread(adapters_of(request, name).delete, name)
    return {"id": name, "object": "adapter", "deleted": True}


async def _receive(request: Request, upload: Upload) -> None:
    """The form's files, by their file names or, where these say nothing, by their fields' names."""
    current, name = None, ""
    async for part, piece in parts(request.stream(), request.headers.get("content-type", "")):
        if part is not current:
            current, named = part, (part.filename, part.name)
            name = next((known for known in named if known in FILES), part.filename or part.name)
            if upload.has(name):
                raise InvalidRequest(f"the file {name!r} appears twice.", parameter=name)
        if len(piece) > ON_LOOP:
            await asyncio.to_thread(upload.write, name, piece)
        else:
            upload.write(name, piece)
