"""/v1/files: upload, list, look at, read and delete. An upload goes to the disk as it comes in."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from quire.errors import InvalidRequest, Overloaded
from quire.server.errors import HttpError
from quire.server.multipart import MAX_FIELD, parts
from quire.server.routes.generate import options_of
from quire.server.routes.openai import OpenAIRoute, after_of, fine_tuning_of, limit_of, listed, owner_of
from quire.server.schema.uploads import shown_file
from quire.service.blobs import Upload
from quire.service.files import FileRecord, Files, storage_error

router = APIRouter(route_class=OpenAIRoute)

MOST_UPLOADS = 4
DEFAULT_LIMIT = MOST_LIMIT = 10_000
FIELDS = ("purpose", "file", "expires_after[anchor]", "expires_after[seconds]")


@router.post("/v1/files")
async def create(request: Request) -> dict[str, Any]:
    """Keep a file; when this is answered, it is on the disk."""
    house = fine_tuning_of(request)
    if house.uploads >= MOST_UPLOADS:
        raise Overloaded(f"{MOST_UPLOADS} files are being uploaded, which is the most at a time.", retry_after=2.0)
    house.uploads += 1
    upload = house.files.begin()
    try:
        fields, filename = await _receive(request, upload)
        return shown_file(await asyncio.to_thread(_keep, house.files, owner_of(request), upload, fields, filename))
    except OSError as error:
        raise storage_error(error) from None
    finally:
        house.uploads -= 1
        upload.discard()


async def _receive(request: Request, upload: Upload) -> tuple[dict[str, str], str]:
    """The form's plain fields and the file's name; the file's bytes go to `upload`."""
    most = options_of(request).max_upload_bytes
    fields: dict[str, bytes] = {}
    filename: str | None = None
    current = None
    async for part, piece in parts(request.stream(), request.headers.get("content-type", "")):
        if part is not current:
            current = part
            if part.name not in FIELDS:
                raise InvalidRequest(
                    f"unknown field {part.name[:100]!r}; known are {', '.join(FIELDS)}.", parameter=part.name[:100]
                )
            if part.name in fields or (part.name == "file" and filename is not None):
                raise InvalidRequest(f"the field {part.name!r} appears twice.", parameter=part.name)
            if part.name == "file":
                filename = part.filename or "upload.jsonl"
            else:
                fields[part.name] = b""
        if part.name == "file":
            if upload.size + len(piece) > most:
                raise HttpError(413, f"a file may have {most} bytes.", {"connection": "close"})
            await asyncio.to_thread(upload.write, piece) if len(piece) > 1 << 16 else upload.write(piece)
        else:
            fields[part.name] += piece
            if len(fields[part.name]) > MAX_FIELD:
                raise InvalidRequest(f"{part.name} may have {MAX_FIELD} bytes.", parameter=part.name)
    if filename is None:
        raise InvalidRequest("'file' is a required property", parameter="file")
    return {name: value.decode("utf-8", "replace") for name, value in fields.items()}, filename


def _keep(files: Files, owner: str, upload: Upload, fields: dict[str, str], filename: str) -> FileRecord:
    if "purpose" not in fields:
        raise InvalidRequest("'purpose' is a required property", parameter="purpose")
    return files.create(owner, upload, filename, fields["purpose"], _seconds(fields))


def _seconds(fields: dict[str, str]) -> int | None:
    """`expires_after`, which a form spells as two fields."""
    anchor, text = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and text is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("expires_after.anchor must be 'created_at'.", parameter="expires_after.anchor")
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 12:
        raise InvalidRequest("expires_after.seconds must be a whole number.", parameter="expires_after.seconds")
    return int(text)


@router.get("/v1/files")
async def files(request: Request) -> dict[str, Any]:
    """The caller's files."""
    house, order = fine_tuning_of(request), request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order must be asc or desc, got {order[:40]!r}.", parameter="order")
    page = await asyncio.to_thread(
        house.files.page,
        owner_of(request),
        after=after_of(request),
        limit=limit_of(request, DEFAULT_LIMIT, MOST_LIMIT),
        order=order,
        purpose=request.query_params.get("purpose"),
    )
    return listed(page, shown_file)


@router.get("/v1/files/{id}")
async def retrieve(request: Request, id: str) -> dict[str, Any]:
    """One file's facts."""
    return shown_file(await asyncio.to_thread(fine_tuning_of(request).files.get, owner_of(request), id))


@router.get("/v1/files/{id}/content")
async def content(request: Request, id: str) -> Response:
    """One file's bytes."""
    house = fine_tuning_of(request)
    record = await asyncio.to_thread(house.files.get, owner_of(request), id)
    headers = {
        "content-length": str(record.bytes),
        "content-disposition": f"attachment; filename*=utf-8''{quote(record.filename)}",
        "x-content-type-options": "nosniff",
    }
    pieces = await asyncio.to_thread(house.files.content, record)
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{id}")
async def delete(request: Request, id: str) -> dict[str, Any]:
    """Delete a file."""
    await asyncio.to_thread(fine_tuning_of(request).files.delete, owner_of(request), id)
    return {"id": id, "object": "file", "deleted": True}
