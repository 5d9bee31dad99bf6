"""Files that clients upload or jobs leave behind: contents by digest, one row each in the store, seen by their owner only.

An owner is an API key's digest, or nothing on a server without keys. A deleted file's row stays as a place in the lists, its
content goes as soon as no job reads it. Knows no HTTP.
"""

from __future__ import annotations

import errno
import json
import secrets
import sqlite3
import string
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import InvalidRequest, NotFound, Unavailable
from quire.service.blobs import Blobs, Upload
from quire.service.store import Store, now

PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
RESULTS = "fine-tune-results"
EXPIRY_LOW, EXPIRY_HIGH = 3600, 30 * 24 * 3600
MAX_NAME = 255
MOST_LINES_TOLD = 10
MAX_LINE = 16 << 20

# What may not be freed: the contents of visible files and of those that unfinished jobs read.
_UNFINISHED = "status IN ('validating_files', 'queued', 'running', 'paused')"
_NEEDED = f"""SELECT sha256 FROM files WHERE NOT deleted
    OR id IN (SELECT json_extract(asked, '$.training_file') FROM jobs WHERE {_UNFINISHED})
    OR id IN (SELECT json_extract(asked, '$.validation_file') FROM jobs WHERE {_UNFINISHED})"""

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class FileRecord:
    """One file."""

    number: int
    id: str
    owner: str
    sha256: str
    bytes: int
    filename: str
    purpose: str
    created_at: int
    expires_at: int | None
    status: str
    status_details: str | None
    deleted: bool


@dataclass(frozen=True)
class PreparedFile:
    """A file whose content is kept; `insert` makes it seen."""

    id: str
    row: tuple[Any, ...]
    arrived: Callable[[], None]

    def insert(self, connection: sqlite3.Connection) -> None:
        columns = "id, owner, sha256, bytes, filename, purpose, created_at, expires_at, status"
        connection.execute(f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", self.row)
        self.arrived()  # frees nothing before this transaction ends, for both are the writing thread's


@dataclass(frozen=True)
class Page:
    """Part of a list."""

    items: list[Any]
    has_more: bool


class Files:
    """All files of one data folder."""

    def __init__(self, store: Store, blobs: Blobs, clock: Callable[[], int] = now) -> None:
        self._store, self._blobs, self._clock = store, blobs, clock
        self._arriving: Counter[str] = Counter()
        """Contents that are on their way to their row."""
        self._arrival = threading.Lock()
        self._mend()

    def begin(self) -> Upload:
        """Where an upload's bytes go; `discard` it in any case."""
        return self._blobs.begin()

    def create(self, owner: str, upload: Upload, filename: str, purpose: str, expires_after: int | None = None) -> FileRecord:
        """Keep an upload. When this returns, file and row are on the disk."""
        prepared = self.prepare(owner, upload, filename, purpose, expires_after)
        self._store.write(prepared.insert)
        return self.get(owner, prepared.id)

    def prepare(
        self, owner: str, upload: Upload, filename: str, purpose: str, expires_after: int | None = None
    ) -> PreparedFile:
        """Check an upload and keep its content; its row is still to be written, or `arrived` to be called."""
        check_purpose(purpose, expires_after)
        if purpose == "fine-tune":
            check_json_lines(upload.lines(), upload.size)
        return self._prepare(owner, upload, filename, purpose, expires_after)

    def prepare_result(self, owner: str, filename: str, data: bytes) -> PreparedFile:
        """A file that a job leaves behind: its content is on the disk, its row comes with the job's last transaction."""
        upload = self.begin()
        try:
            upload.write(data)
            return self._prepare(owner, upload, filename, RESULTS, None)
        finally:
            upload.discard()

    def _prepare(self, owner: str, upload: Upload, filename: str, purpose: str, expires_after: int | None) -> PreparedFile:
        digest = upload.digest()
        with self._arrival:
            self._arriving[digest] += 1
        try:
            upload.finish()
        except OSError as error:
            raise storage_error(error) from None
        created = self._clock()
        expires_at = None if expires_after is None else created + expires_after
        name, id = clean_name(filename), new_id("file-")
        row = (id, owner, digest, upload.size, name, purpose, created, expires_at, "processed")
        return PreparedFile(id, row, lambda: self._arrived(digest))

    def _arrived(self, digest: str) -> None:
        with self._arrival:
            self._arriving[digest] -= 1

    def get(self, owner: str, id: str) -> FileRecord:
        """One file, or NotFound."""
        query = "SELECT * FROM files WHERE id = ? AND owner = ? AND NOT deleted AND (expires_at IS NULL OR expires_at > ?)"
        rows = self._store.read(query, (id, owner, self._clock()))
        if not rows:
            raise NotFound(f"No such File object: {id[:100]}", parameter="id")
        return _record(rows[0])

    def held(self, id: str) -> FileRecord:
        """One file as a job that holds it sees it: also after its deletion."""
        rows = self._store.read("SELECT * FROM files WHERE id = ?", (id,))
        if not rows:
            raise NotFound(f"No such File object: {id[:100]}", parameter="id")
        return _record(rows[0])

    def page(self, owner: str, *, after: str | None, limit: int, order: str, purpose: str | None) -> Page:
        """Files of one owner, newest first unless `order` is asc."""
        where = "owner = ? AND NOT deleted AND (expires_at IS NULL OR expires_at > ?)"
        values: list[Any] = [owner, self._clock()]
        if purpose is not None:
            where, values = where + " AND purpose = ?", [*values, purpose]
        within = ("owner", owner)
        page = page_of(self._store, "files", where, values, after, limit, ascending=order == "asc", within=within)
        return Page([_record(row) for row in page.items], page.has_more)

    def content(self, record: FileRecord) -> Iterator[bytes]:
        """A file's bytes in pieces."""
        try:
            return self._blobs.pieces(self._blobs.path(record.sha256).open("rb"))
        except FileNotFoundError:
            raise NotFound(f"No such File object: {record.id}", parameter="id") from None

    def path(self, id: str) -> Path:
        """Where the content of a file lies that a job holds. Raises NotFound."""
        record = self.held(id)
        if not record.sha256 or record.status == "error":
            raise NotFound(f"No such File object: {id}", parameter="id")
        return self._blobs.path(record.sha256)

    def delete(self, owner: str, id: str) -> None:
        """Take a file out of every list; its content stays for as long as an unfinished job needs it."""
        self.get(owner, id)
        self._store.write(lambda connection: connection.execute("UPDATE files SET deleted = 1 WHERE id = ?", (id,)))
        self.sweep()

    def sweep(self) -> None:
        """Free the contents of deleted and expired files that no unfinished job needs."""
        self._store.write(self._sweep)

    def _sweep(self, connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE files SET deleted = 1 WHERE expires_at <= ? AND NOT deleted", (self._clock(),))
        gone = connection.execute(
            f"SELECT DISTINCT sha256 FROM files WHERE deleted AND sha256 != '' AND sha256 NOT IN ({_NEEDED})"
        ).fetchall()
        for (digest,) in gone:
            with self._arrival:
                if not self._arriving[digest]:
                    self._blobs.remove(digest)
                    connection.execute("UPDATE files SET sha256 = '' WHERE deleted AND sha256 = ?", (digest,))

    def _mend(self) -> None:
        """After an unclean end: contents without a row go, rows without a content say so."""
        rows = self._store.read("SELECT id, sha256 FROM files WHERE NOT deleted OR sha256 != ''")
        self._blobs.sweep({row["sha256"] for row in rows})
        lost = [row["id"] for row in rows if not self._blobs.path(row["sha256"]).is_file()]

        def mark(connection: sqlite3.Connection) -> None:
            query = "UPDATE files SET status = 'error', status_details = 'the content is lost' WHERE id = ? AND NOT deleted"
            connection.executemany(query, [(id,) for id in lost])

        if lost:
            self._store.write(mark)
        self.sweep()


def page_of(
    store: Store,
    table: str,
    where: str,
    values: Sequence[Any],
    after: str | None,
    limit: int,
    *,
    ascending: bool = False,
    within: tuple[str, str] | None = None,
) -> Page:
    """Rows of a table in the order of their numbers, beginning behind the one whose id is `after`.

    within: (column, value) that the row called `after` must have; a deleted one still marks its place.
    """
    values = list(values)
    if after is not None:
        clause, more = ("", []) if within is None else (f" AND {within[0]} = ?", [within[1]])
        found = store.read(f"SELECT number FROM {table} WHERE id = ?{clause}", [after, *more])
        if not found:
            raise InvalidRequest(f"after must be the id of an item of this list, got {after[:100]!r}.", parameter="after")
        where += f" AND number {'>' if ascending else '<'} ?"
        values.append(found[0]["number"])
    order = "ASC" if ascending else "DESC"
    rows = store.read(f"SELECT * FROM {table} WHERE {where} ORDER BY number {order} LIMIT ?", [*values, limit + 1])
    return Page(rows[:limit], len(rows) > limit)


def check_purpose(purpose: str, expires_after: int | None) -> None:
    """Raise InvalidRequest for a purpose that is none, or a life that is too short or too long."""
    if purpose not in PURPOSES:
        raise InvalidRequest(
            f"'{purpose[:100]}' is not one of {list(PURPOSES)} - 'purpose'", parameter="purpose", value=purpose
        )
    if expires_after is not None and not EXPIRY_LOW <= expires_after <= EXPIRY_HIGH:
        raise InvalidRequest(
            f"expires_after.seconds must be in [{EXPIRY_LOW}, {EXPIRY_HIGH}], got {expires_after}.",
            parameter="expires_after.seconds",
        )


def check_json_lines(lines: Iterable[bytes], size: int) -> None:
    """Raise InvalidRequest, naming lines, unless each is a JSON object. Blank lines at the end do no harm."""
    wrong: list[str] = []
    count, blank = 0, 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            wrong.append(f"Line {blank} is empty.")
            blank = 0
        count += 1
        fault = _fault_of_line(line)
        if fault:
            wrong.append(f"Line {number} {fault}")
    if wrong:
        told = wrong[:MOST_LINES_TOLD] + ([f"And {len(wrong) - MOST_LINES_TOLD} more."] if len(wrong) > MOST_LINES_TOLD else [])
        raise InvalidRequest(
            "Expected file to have JSONL format, where every line is a valid JSON dictionary. " + " ".join(told),
            parameter="file",
        )
    if not count:
        raise InvalidRequest("File is empty: it must have at least one line.", parameter="file", value=size)


def _fault_of_line(line: bytes) -> str | None:
    if len(line) > MAX_LINE:
        return f"is longer than {MAX_LINE} bytes."
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return "is not UTF-8." if isinstance(error, UnicodeDecodeError) else f"is not JSON ({str(error)[:100]})."
    return None if isinstance(value, dict) else f"is not a dictionary but {type(value).__name__}."


def new_id(prefix: str, letters: int = 24) -> str:
    """A random id."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(letters))


def clean_name(name: str) -> str:
    """A file's name as it is shown: only its last part, without what could mean something to a terminal or a header."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    shown = "".join(letter for letter in last if letter.isprintable() and letter not in '"<>|:*?').strip(". ")
    return shown[:MAX_NAME] or "file"


def _record(row: sqlite3.Row) -> FileRecord:
    return FileRecord(**{**dict(row), "deleted": bool(row["deleted"])})


def storage_error(error: OSError) -> Exception:
    """A full disk is the server's trouble, and trying again at once will not help."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable("the server's disk is full.")
    return error
