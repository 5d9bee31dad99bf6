"""One file of packed weights: written as a whole or not at all, looked through by all threads, refused when anything is wrong.

    8 bytes `QUIREPK1` | length of the header | SHA-256 of the header | header (JSON) | data from the next (large) page on

The header has the key that the file was made for, what each piece of data is (quire/weights/packed_cache.py says that), and a
sum of each stretch of data, so that a file that was cut, torn or has a flipped bit is found before it is used.
Data are used where they are mapped: nothing is copied, and processes share them. Knows no torch, so that reading can begin
before torch is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import struct
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"QUIREPK1"
HEAD = struct.Struct("<8sQ32s")
STRETCH = 16 << 20
"""Bytes that are summed by one thread at a time."""
LARGE_PAGE = 2 << 20
ALIGNED = 64
PART = ".part"
MOST_HEADER_BYTES = 100 << 20


class Damaged(Exception):
    """The file is not what was written."""


@dataclass(frozen=True)
class Place:
    """Where one tensor's bytes lie in the data."""

    start: int
    size: int


def places(sizes: Iterable[int]) -> list[Place]:
    """Tensors of these sizes, one after the other, each aligned."""
    laid, end = [], 0
    for size in sizes:
        start = -(-end // ALIGNED) * ALIGNED
        laid.append(Place(start, size))
        end = start + size
    return laid


def stretch_sum(data: memoryview) -> str:
    """16 hexadecimal digits that every change of one place changes; about as fast as memory, and without the GIL."""
    import numpy as np

    whole = len(data) // 8 * 8
    words = int(np.add.reduce(np.frombuffer(data[:whole], np.uint64), dtype=np.uint64)) if whole else 0
    return f"{(words + int.from_bytes(data[whole:], 'little') + len(data)) % (1 << 64):016x}"


def write(path: Path, key: str, facts: Mapping[str, Any], tensors: Sequence[memoryview]) -> None:
    """Write the file under a name of its own and rename it when all of it is on the disk. Raises OSError.

    tensors: laid by `places`. A kill in between leaves a part that nobody reads and `clear_parts` takes away.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    laid = places(len(one) for one in tensors)
    size = laid[-1].start + laid[-1].size if laid else 0
    sums = ["0" * 16] * -(-size // STRETCH)
    start = _data_start(len(_header(key, size, sums, facts)), size)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=PART, dir=path.parent)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # for as long as somebody writes it, it is not clutter
            file.seek(start)
            for number, piece in enumerate(_stretches(laid, tensors, size)):
                sums[number] = stretch_sum(piece)
                _write_all(handle, piece)
            file.truncate(start + size)
            file.seek(0)
            _write_all(handle, memoryview(_header(key, size, sums, facts)))
            os.fsync(file.fileno())
            os.replace(name, path)
        _folder_to_disk(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _header(key: str, size: int, sums: Sequence[str], facts: Mapping[str, Any]) -> bytes:
    text = json.dumps({"key": key, "size": size, "sums": sums, "facts": facts}).encode()
    return HEAD.pack(MAGIC, len(text), hashlib.sha256(text).digest()) + text


def _stretches(laid: Sequence[Place], tensors: Sequence[memoryview], size: int) -> Iterator[memoryview]:
    """The data in stretches, gaps filled with zeros."""
    stretch, filled = bytearray(min(STRETCH, size)), 0
    end = 0
    for place, tensor in zip(laid, tensors, strict=True):
        for piece in (memoryview(bytes(place.start - end)), tensor):
            begin = 0
            while begin < len(piece):
                count = min(len(piece) - begin, len(stretch) - filled)
                stretch[filled : filled + count] = piece[begin : begin + count]
                begin, filled = begin + count, filled + count
                if filled == len(stretch):
                    yield memoryview(stretch)
                    filled = 0
        end = place.start + place.size
    if filled:
        yield memoryview(stretch)[:filled]


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _data_start(head: int, size: int) -> int:
    """Large data begin where a large page may; what is left out before takes no room on the disk."""
    page = LARGE_PAGE if size >= LARGE_PAGE else mmap.PAGESIZE
    return -(-head // page) * page


def _folder_to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def header(path: Path) -> dict[str, Any]:
    """The header of a file, with `start` of its data. Raises Damaged and OSError."""
    with path.open("rb") as file:
        try:
            magic, length, digest = HEAD.unpack(file.read(HEAD.size))
        except struct.error:
            raise Damaged("it is cut short") from None
        if magic != MAGIC or length > MOST_HEADER_BYTES:
            raise Damaged("it is no file of packed weights")
        text = file.read(length)
        if hashlib.sha256(text).digest() != digest:
            raise Damaged("its header is damaged")
        found: dict[str, Any] = json.loads(text)
        found["start"] = _data_start(HEAD.size + length, found["size"])
        if os.fstat(file.fileno()).st_size != found["start"] + found["size"]:
            raise Damaged("it is cut short")
        return found


class Reading:
    """A file that is brought into memory and looked through, by `threads` of its own, from now on."""

    def __init__(self, path: Path, key: str, threads: int) -> None:
        self._error: Damaged | None = None
        self._header = header(path)
        if self._header["key"] != key:
            raise Damaged("it was made for something else")
        with path.open("rb") as file:
            # Private: nothing writes to it, and nothing could reach the file.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without them
                mapping.madvise(mmap.MADV_HUGEPAGE)
        start = self._header["start"]
        if len(mapping) != start + self._header["size"]:
            raise Damaged("it is cut short")
        self._data = memoryview(mapping)[start:]
        self._next, self._lock = 0, threading.Lock()
        self._threads = [threading.Thread(target=self._look, name="quire-read", daemon=True) for _ in range(max(1, threads))]
        for thread in self._threads:
            thread.start()

    def result(self) -> tuple[dict[str, Any], memoryview]:
        """(what the writer said, the data), when all has been seen. Raises Damaged."""
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return self._header["facts"], self._data

    def _look(self) -> None:
        sums = self._header["sums"]
        while self._error is None:
            with self._lock:
                number, self._next = self._next, self._next + 1
            if number >= len(sums):
                return
            if stretch_sum(self._data[number * STRETCH : (number + 1) * STRETCH]) != sums[number]:
                self._error = Damaged("its data are damaged")


def clear_parts(folder: Path) -> None:
    """Take away what writers left behind that were killed."""
    for part in folder.glob(f".*{PART}"):
        with contextlib.suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def being_written(folder: Path, stem: str) -> bool:
    """Whether some process is writing the file of that name now."""
    for part in folder.glob(f".{stem}.*{PART}"):
        try:
            with part.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            continue
    return False
