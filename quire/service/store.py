"""What must survive: one SQLite file, written by one thread, where a write that has returned is on the disk.

WAL with `synchronous=FULL`: a commit is synced before anybody is told. All writes run on one thread, one transaction each;
reads run where they are asked, on a connection of their own thread, fetch all rows at once and hold nothing open. Knows tables
and transactions; what files and jobs mean is in files.py and jobs.py.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from quire.errors import ConfigError, Unavailable
from quire.log import logger

log = logger(__name__)

Result = TypeVar("Result")
Write = Callable[[sqlite3.Connection], Result]

BUSY_MS = 10_000
CHECKPOINT_PAGES = 1000

# number: order of arrival, which is the order of every list. owner: the API key that something belongs to.
_FIRST = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER,
    status TEXT NOT NULL, status_details TEXT, deleted INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, status TEXT NOT NULL,
    created_at INTEGER NOT NULL, metadata TEXT, asked TEXT NOT NULL, facts TEXT NOT NULL
);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job TEXT NOT NULL REFERENCES jobs(id),
    created_at INTEGER NOT NULL, level TEXT NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL, data TEXT, step INTEGER
);
CREATE INDEX events_of_job ON events(job, number);
CREATE TABLE checkpoints (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job TEXT NOT NULL REFERENCES jobs(id),
    created_at INTEGER NOT NULL, step INTEGER NOT NULL, model TEXT NOT NULL, metrics TEXT NOT NULL, UNIQUE (job, step)
);
CREATE TABLE models (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, job TEXT NOT NULL,
    folder TEXT NOT NULL, step INTEGER, created_at INTEGER NOT NULL, deleted INTEGER NOT NULL DEFAULT 0
);
"""
# part_ids: of a completed upload, in their order. file: what became of it.
_SECOND = """
CREATE TABLE uploads (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, bytes INTEGER NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, keep_seconds INTEGER, created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL, status TEXT NOT NULL, part_ids TEXT, file TEXT
);
CREATE TABLE upload_parts (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, upload TEXT NOT NULL REFERENCES uploads(id),
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL
);
CREATE INDEX parts_of_upload ON upload_parts(upload, number);
CREATE TABLE permissions (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, model TEXT NOT NULL,
    project TEXT NOT NULL, created_at INTEGER NOT NULL, UNIQUE (model, project)
);
"""
# What each layout adds to the one before; a folder of an older Quire gets what it lacks.
_LAYOUTS = (_FIRST, _SECOND)
VERSION = len(_LAYOUTS)


class Store:
    """The database under `folder`. One process owns it at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "quire.sqlite3"
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._writes: SimpleQueue[tuple[Write[Any], Future[Any]] | None] = SimpleQueue()
        self._closed = False
        self._door = threading.Lock()
        try:
            connection = _connect(self.path)
            _prepare(connection, self.path)
        except sqlite3.Error as error:
            raise ConfigError(f"data_dir holds a database that cannot be opened: {error}.") from None
        self._thread = threading.Thread(target=self._run, args=(connection,), name="quire-store", daemon=True)
        self._thread.start()

    def submit(self, work: Write[Result]) -> Future[Result]:
        """Run `work` in a transaction of its own on the writing thread. When the future is done, it is on the disk."""
        future: Future[Result] = Future()
        with self._door:
            if self._closed:
                raise Unavailable("the store is closed: the server is shutting down.", retry_after=10.0)
            self._writes.put((work, future))
        return future

    def write(self, work: Write[Result]) -> Result:
        """`submit`, and wait."""
        return self.submit(work).result()

    def read(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of one query."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = _connect(self.path)
            with self._door:
                self._readers.append(connection)
        return connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Finish the writes that were asked for and close the file."""
        with self._door:
            if self._closed:
                return
            self._closed = True
            self._writes.put(None)
        self._thread.join(timeout=60)
        for connection in self._readers:
            connection.close()

    def _run(self, connection: sqlite3.Connection) -> None:
        while (item := self._writes.get()) is not None:
            work, future = item
            try:
                connection.execute("BEGIN IMMEDIATE")
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError):
                    log.error("a write to the store failed: %s", error)
                future.set_exception(error)
            else:
                future.set_result(result)
        connection.close()


def _connect(path: Path) -> sqlite3.Connection:
    # Connections are closed by `Store.close`, whichever thread opened them; SQLite itself is built to be shared.
    connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_MS / 1000, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """WAL, and the tables that the file does not have yet."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise ConfigError(f"data_dir was written by a newer Quire (layout {version}, this one knows {VERSION}).")
    if version < VERSION:
        connection.execute("BEGIN IMMEDIATE")
        for statement in ";".join(_LAYOUTS[version:]).split(";"):
            if statement.strip():
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version={VERSION}")
        connection.execute("COMMIT")
        log.info("%s store in %s", "new" if version == 0 else "newer layout of the", path.parent)


def now() -> int:
    """Seconds, as the API's timestamps are."""
    return int(time.time())
