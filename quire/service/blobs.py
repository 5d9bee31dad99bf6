"""Contents of files, by their digest: written aside, synced, then renamed, so that a name is only ever seen on whole content.

Knows no database: which contents are still wanted is told by the caller.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 20
KEEP_SECONDS = 3600
"""Contents without an owner are kept so long: one may just be on its way to its row."""


class Blobs:
    """The folders `blobs/` and `tmp/` under one data folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._aside = folder / "blobs", folder / "tmp"
        shutil.rmtree(self._aside, ignore_errors=True)  # unfinished uploads of an earlier life
        for made in (self._folder, self._aside):
            made.mkdir(parents=True, exist_ok=True)

    def begin(self) -> Upload:
        """A new content, to be written in pieces."""
        return Upload(self._aside / uuid.uuid4().hex, self._folder)

    def path(self, digest: str) -> Path:
        """Where a content lies."""
        return self._folder / digest

    @staticmethod
    def pieces(file: BinaryIO) -> Iterator[bytes]:
        """An open content in pieces; closes it. Deleted meanwhile, it is still read to its end."""
        with file:
            while piece := file.read(CHUNK):
                yield piece

    def sweep(self, wanted: Iterable[str], age: float = KEEP_SECONDS) -> int:
        """Delete contents that nobody wants and that are older than `age` seconds; returns how many."""
        kept, oldest, gone = set(wanted), time.time() - age, 0
        for path in self._folder.iterdir():
            if path.name not in kept and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
                gone += 1
        return gone

    def remove(self, digest: str) -> None:
        """Delete a content that nobody wants any more."""
        self.path(digest).unlink(missing_ok=True)


class Upload:
    """A content that is being written. `discard` is harmless after `finish` and belongs into a `finally`."""

    def __init__(self, path: Path, target: Path) -> None:
        self._path, self._target = path, target
        self._file: BinaryIO | None = path.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def lines(self) -> Iterator[bytes]:
        """What was written, line by line."""
        assert self._file is not None
        self._file.flush()
        with self._path.open("rb") as file:
            yield from file

    def digest(self) -> str:
        """sha256 of what was written so far."""
        return self._digest.hexdigest()

    def finish(self, name: str | None = None) -> None:
        """Sync, give it its name (its digest, if none is given), sync the folder."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(self._path, self._target / (name or self.digest()))
        sync_folder(self._target)

    def discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
