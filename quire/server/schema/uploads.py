"""Bodies of /v1/uploads, and uploads and parts as clients read them."""

from __future__ import annotations

from typing import Any, ClassVar

from quire.errors import InvalidRequest
from quire.server.schema.base import RequestBody
from quire.service.files import FileRecord
from quire.service.uploads import Part, UploadRecord


class UploadBody(RequestBody):
    """An upload to begin. mime_type is required at OpenAI; what a file holds is told by its purpose, so here it is not."""

    bytes: int
    filename: str
    purpose: str
    mime_type: str = ""
    expires_after: dict[str, Any] | None = None

    refused: ClassVar[dict[str, str]] = {}

    def keep_seconds(self) -> int | None:
        """`expires_after`: how long the file is to be kept."""
        if self.expires_after is None:
            return None
        if self.expires_after.get("anchor") != "created_at":
            raise InvalidRequest("expires_after.anchor must be 'created_at'.", parameter="expires_after.anchor")
        seconds = self.expires_after.get("seconds")
        if type(seconds) is not int:
            raise InvalidRequest("expires_after.seconds must be a whole number.", parameter="expires_after.seconds")
        return seconds


class CompleteBody(RequestBody):
    """An upload to complete."""

    part_ids: list[str]
    md5: str | None = None

    refused: ClassVar[dict[str, str]] = {}


def shown_upload(record: UploadRecord, file: dict[str, Any] | None = None) -> dict[str, Any]:
    """An upload. file: what it has become."""
    return {
        "id": record.id,
        "object": "upload",
        "bytes": record.bytes,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": record.status,
        "file": file,
    }


def shown_part(part: Part) -> dict[str, Any]:
    """A part."""
    return {"id": part.id, "object": "upload.part", "created_at": part.created_at, "upload_id": part.upload}


def shown_file(record: FileRecord) -> dict[str, Any]:
    """A file as clients read it."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": record.status,
        "status_details": record.status_details,
    }
