"""/v1/uploads: large files in parts. A part goes to the disk as it comes in."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from quire.errors import InvalidRequest, Overloaded
from quire.server.body import described, json_body
from quire.server.errors import HttpError
from quire.server.multipart import parts
from quire.server.routes.files import MOST_UPLOADS
from quire.server.routes.openai import OpenAIRoute, fine_tuning_of, owner_of
from quire.server.schema.uploads import CompleteBody, UploadBody, shown_file, shown_part, shown_upload
from quire.service.blobs import Upload
from quire.service.files import storage_error
from quire.service.uploads import PART_BYTES

router = APIRouter(route_class=OpenAIRoute)


@router.post("/v1/uploads", openapi_extra=described(UploadBody))
async def create(request: Request, body: Annotated[UploadBody, Depends(json_body(UploadBody))]) -> dict[str, Any]:
    """Begin an upload."""
    given = owner_of(request), body.bytes, body.filename, body.purpose, body.keep_seconds()
    return shown_upload(await asyncio.to_thread(fine_tuning_of(request).parts.create, *given))


@router.post("/v1/uploads/{id}/parts")
async def add(request: Request, id: str) -> dict[str, Any]:
    """Keep a part; when this is answered, it is on the disk."""
    house = fine_tuning_of(request)
    await asyncio.to_thread(house.parts.pending, owner_of(request), id)  # before its bytes are read
    if house.uploads >= MOST_UPLOADS:
        raise Overloaded(f"{MOST_UPLOADS} files are being uploaded, which is the most at a time.", retry_after=2.0)
    house.uploads += 1
    upload = house.parts.begin()
    try:
        await _receive(request, upload)
        return shown_part(await asyncio.to_thread(house.parts.add, owner_of(request), id, upload))
    except OSError as error:
        raise storage_error(error) from None
    finally:
        house.uploads -= 1
        upload.discard()


async def _receive(request: Request, upload: Upload) -> None:
    """The form's one field, `data`, to `upload`."""
    current = None
    async for part, piece in parts(request.stream(), request.headers.get("content-type", "")):
        if part.name != "data":
            message = f"unknown field {part.name[:100]!r}; known is data."
            raise InvalidRequest(message, parameter=part.name[:100])
        if current is not None and part is not current:
            raise InvalidRequest("the field 'data' appears twice.", parameter="data")
        current = part
        if upload.size + len(piece) > PART_BYTES:
            raise HttpError(413, f"a part may have {PART_BYTES} bytes.", {"connection": "close"})
        await asyncio.to_thread(upload.write, piece) if len(piece) > 1 << 16 else upload.write(piece)
    if current is None:
        raise InvalidRequest("'data' is a required property", parameter="data")


@router.post("/v1/uploads/{id}/complete", openapi_extra=described(CompleteBody))
async def complete(
    request: Request, id: str, body: Annotated[CompleteBody, Depends(json_body(CompleteBody))]
) -> dict[str, Any]:
    """Make one file of the parts; when this is answered, it is on the disk."""
    given = owner_of(request), id, body.part_ids, body.md5
    record, file = await asyncio.to_thread(fine_tuning_of(request).parts.complete, *given)
    return shown_upload(record, shown_file(file))


@router.post("/v1/uploads/{id}/cancel")
async def cancel(request: Request, id: str) -> dict[str, Any]:
    """Forget an upload and its parts."""
    return shown_upload(await asyncio.to_thread(fine_tuning_of(request).parts.cancel, owner_of(request), id))
