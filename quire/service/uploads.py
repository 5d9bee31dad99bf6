"""Files that come in parts: an upload is begun, its parts are kept one by one, and completing it makes one file of them.

A part that was acknowledged is on the disk, as a file is. An upload that is completed, cancelled or has expired keeps its row,
and its parts go. Asking once more for what has been done already is answered as the first time, for a client whose answer was
lost asks again. Knows no HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.errors import InvalidRequest, NotFound, TooManyRequests
from quire.service.blobs import Blobs, Upload
from quire.service.files import FileRecord, Files, check_purpose, clean_name, new_id, storage_error
from quire.service.store import Store, now

LIFE_SECONDS = 3600
MOST_PENDING = 16
"""Unfinished uploads of one owner."""
PART_BYTES = 64 << 20
MOST_PARTS = 10_000
SENT_AGAIN = 2
"""All parts of an upload may have so many times its bytes: one whose answer was lost is sent once more."""


@dataclass(frozen=True)
class UploadRecord:
    """One upload. keep_seconds: the life of the file that it becomes. file: that file's id."""

    number: int
    id: str
    owner: str
    bytes: int
    filename: str
    purpose: str
    keep_seconds: int | None
    created_at: int
    expires_at: int
    status: str
    part_ids: str | None
    file: str | None


@dataclass(frozen=True)
class Part:
    """One part."""

    id: str
    upload: str
    created_at: int


class Uploads:
    """All uploads of one data folder. most: bytes of the largest file."""

    def __init__(self, store: Store, files: Files, folder: Path, most: int, clock: Callable[[], int] = now) -> None:
        self._store, self._files, self._most, self._clock = store, files, most, clock
        self._parts = Blobs(folder / "uploads")
        self._sweep(age=0.0)  # nobody is writing yet

    def begin(self) -> Upload:
        """Where a part's bytes go; `discard` it in any case."""
        return self._parts.begin()

    def create(self, owner: str, size: int, filename: str, purpose: str, keep_seconds: int | None = None) -> UploadRecord:
        """An upload of `size` bytes that waits for its parts."""
        check_purpose(purpose, keep_seconds)
        if not 1 <= size <= self._most:
            raise InvalidRequest(f"bytes must be in [1, {self._most}], got {size}.", parameter="bytes")
        if not filename:
            raise InvalidRequest("filename must not be empty.", parameter="filename")
        self._sweep()
        id, created = new_id("upload_"), self._clock()
        row = (id, owner, size, clean_name(filename), purpose, keep_seconds, created, created + LIFE_SECONDS, "pending")

        def insert(connection: sqlite3.Connection) -> None:
            query = "SELECT count(*) FROM uploads WHERE owner = ? AND status = 'pending'"
            if connection.execute(query, (owner,)).fetchone()[0] >= MOST_PENDING:
                raise TooManyRequests(f"{MOST_PENDING} uploads are not completed yet, which is the most of one key.")
            columns = "id, owner, bytes, filename, purpose, keep_seconds, created_at, expires_at, status"
            connection.execute(f"INSERT INTO uploads ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

        self._store.write(insert)
        return self.get(owner, id)

    def get(self, owner: str, id: str) -> UploadRecord:
        """One upload, or NotFound."""
        rows = self._store.read("SELECT * FROM uploads WHERE id = ? AND owner = ?", (id, owner))
        if not rows:
            raise NotFound(f"No such Upload object: {id[:100]}", parameter="upload_id")
        return UploadRecord(**dict(rows[0]))

    def pending(self, owner: str, id: str) -> UploadRecord:
        """One upload that still takes parts. Raises NotFound, and InvalidRequest saying what it is instead."""
        found = self.get(owner, id)
        if found.status == "pending" and found.expires_at <= self._clock():
            self._sweep()
            found = self.get(owner, id)
        if found.status != "pending":
            raise InvalidRequest(f"the upload is {found.status}; it must be pending.", parameter="upload_id")
        return found

    def add(self, owner: str, id: str, upload: Upload) -> Part:
        """Keep what was written to `upload` as a part. When this returns, it is on the disk."""
        record = self.pending(owner, id)
        if not upload.size:
            raise InvalidRequest("data must have at least one byte.", parameter="data")
        part = Part(new_id("part_"), id, self._clock())
        size = upload.size
        try:
            upload.finish(part.id)
        except OSError as error:
            raise storage_error(error) from None

        def insert(connection: sqlite3.Connection) -> None:
            (status,) = connection.execute("SELECT status FROM uploads WHERE id = ?", (id,)).fetchone()
            if status != "pending":
                raise InvalidRequest(f"the upload is {status}; it must be pending.", parameter="upload_id")
            query = "SELECT count(*), total(bytes) FROM upload_parts WHERE upload = ?"
            count, held = connection.execute(query, (id,)).fetchone()
            if count >= MOST_PARTS:
                raise InvalidRequest(f"an upload may have {MOST_PARTS} parts.", parameter="data")
            if held + size > SENT_AGAIN * record.bytes:
                raise InvalidRequest(
                    f"parts may have {SENT_AGAIN} times the {record.bytes} bytes that the upload was created with, "
                    f"got {int(held) + size}.",
                    parameter="data",
                )
            row = (part.id, id, size, part.created_at)
            connection.execute("INSERT INTO upload_parts (id, upload, bytes, created_at) VALUES (?, ?, ?, ?)", row)

        try:
            self._store.write(insert)
        except BaseException:
            self._parts.remove(part.id)
            raise
        return part

    def complete(self, owner: str, id: str, part_ids: Sequence[str], md5: str | None = None) -> tuple[UploadRecord, FileRecord]:
        """One file of these parts, in this order. When this returns, it is on the disk."""
        order = json.dumps(list(part_ids))
        before = self.get(owner, id)
        if before.status == "completed" and before.part_ids == order and before.file is not None:
            return before, self._files.get(owner, before.file)
        record = self.pending(owner, id)
        self._check_parts(record, part_ids)
        whole = self._files.begin()
        try:
            found = self._join(part_ids, whole)
            if md5 is not None and md5.lower() != found:
                raise InvalidRequest(f"md5 must be that of the parts together, {found}, got {md5[:64]!r}.", parameter="md5")
            prepared = self._files.prepare(owner, whole, record.filename, record.purpose, record.keep_seconds)
        except OSError as error:
            raise storage_error(error) from None
        finally:
            whole.discard()

        def finish(connection: sqlite3.Connection) -> None:
            query = "UPDATE uploads SET status = 'completed', part_ids = ?, file = ? WHERE id = ? AND status = 'pending'"
            if connection.execute(query, (order, prepared.id, id)).rowcount != 1:
                raise InvalidRequest("the upload was completed or cancelled meanwhile.", parameter="upload_id")
            prepared.insert(connection)

        try:
            self._store.write(finish)
        except InvalidRequest:
            prepared.arrived()  # its row will not come; a content without a row goes with a later start
            raise
        self._drop(id)
        return self.get(owner, id), self._files.get(owner, prepared.id)

    def cancel(self, owner: str, id: str) -> UploadRecord:
        """Take no more parts and forget those that are there."""
        if self.get(owner, id).status != "cancelled":
            self.pending(owner, id)
            self._close(id, "cancelled")
        return self.get(owner, id)

    def _check_parts(self, record: UploadRecord, part_ids: Sequence[str]) -> None:
        rows = self._store.read("SELECT id, bytes FROM upload_parts WHERE upload = ?", (record.id,))
        sizes = {row["id"]: row["bytes"] for row in rows}
        for place, part in enumerate(part_ids):
            if part not in sizes:
                message = f"part_ids[{place}] must be a part of this upload, got {part[:100]!r}."
                raise InvalidRequest(message, parameter=f"part_ids[{place}]")
        if len(set(part_ids)) < len(part_ids):
            raise InvalidRequest("part_ids must name each part once.", parameter="part_ids")
        total = sum(sizes[part] for part in part_ids)
        if total != record.bytes:
            raise InvalidRequest(
                f"the parts must have the {record.bytes} bytes that the upload was created with, got {total}.",
                parameter="part_ids",
            )

    def _join(self, part_ids: Sequence[str], whole: Upload) -> str:
        """Write the parts one after the other; their md5."""
        digest = hashlib.md5(usedforsecurity=False)
        for part in part_ids:
            for piece in self._parts.pieces(self._parts.path(part).open("rb")):
                whole.write(piece)
                digest.update(piece)
        return digest.hexdigest()

    def _close(self, id: str, status: str) -> None:
        query = "UPDATE uploads SET status = ? WHERE id = ? AND status = 'pending'"
        self._store.write(lambda connection: connection.execute(query, (status, id)))
        self._drop(id)

    def _drop(self, id: str) -> None:
        """Free the parts of an upload that is not pending."""
        for row in self._store.read("SELECT id FROM upload_parts WHERE upload = ?", (id,)):
            with contextlib.suppress(OSError):  # the next start tries again
                self._parts.remove(row["id"])

    def _sweep(self, age: float | None = None) -> None:
        """End what has expired. age: also free parts that belong to nothing and are older than so many seconds."""
        due = self._store.read("SELECT id FROM uploads WHERE status = 'pending' AND expires_at <= ?", (self._clock(),))
        for row in due:
            self._close(row["id"], "expired")
        if age is not None:
            query = "SELECT id FROM upload_parts WHERE upload IN (SELECT id FROM uploads WHERE status = 'pending')"
            self._parts.sweep({row["id"] for row in self._store.read(query)}, age)
