"""multipart/form-data as it comes in, piece by piece: nothing of a file is held in memory beyond one piece.

Knows the format only (RFC 7578); what the fields mean, and where a file's bytes go, is the route's business.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from quire.errors import InvalidRequest

MAX_PARTS = 32
MAX_PART_HEAD = 8 << 10
MAX_FIELD = 4 << 10

_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_PARAMETER = re.compile(r';\s*([\w*-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))')


@dataclass(frozen=True)
class Part:
    """One part's head; `filename` is None for a plain field."""

    name: str
    filename: str | None


async def parts(stream: AsyncIterator[bytes], content_type: str) -> AsyncIterator[tuple[Part, bytes]]:
    """(part, piece of its content) in order; each part gives at least one piece, which may be empty.

    Raises InvalidRequest where the body breaks the format or ends before its last border.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise InvalidRequest("content-type must name the boundary of its parts.")
    border = b"\r\n--" + (found[1] or found[2]).encode("latin-1")
    reader = _Reader(border)
    async for data in stream:
        for item in reader.feed(data):
            yield item
    if not reader.ended:
        raise InvalidRequest("the body ended in the middle of a part.")


class _Reader:
    """Bytes in, pieces out. The first border has no line before it: one is pretended."""

    def __init__(self, border: bytes) -> None:
        self._border, self._buffer = border, b"\r\n"
        self._part: Part | None = None
        self._state = "opening"
        self._parts = 0

    @property
    def ended(self) -> bool:
        return self._state == "ended"

    def feed(self, data: bytes) -> list[tuple[Part, bytes]]:
        made: list[tuple[Part, bytes]] = []
        self._buffer += data
        while self._advance(made):
            pass
        return made

    def _advance(self, made: list[tuple[Part, bytes]]) -> bool:
        """One thing further; False when more bytes are needed."""
        if self._state == "ended":
            self._buffer = b""  # an epilogue means nothing
            return False
        if self._state == "after border":
            return self._after_border()
        if self._state == "head":
            return self._head(made)
        place = self._buffer.find(self._border)
        if place >= 0:
            self._give(made, self._buffer[:place])
            self._buffer = self._buffer[place + len(self._border) :]
            self._state = "after border"
            return True
        kept = len(self._border) - 1
        if len(self._buffer) > kept:
            self._give(made, self._buffer[:-kept])
            self._buffer = self._buffer[-kept:]
        return False

    def _give(self, made: list[tuple[Part, bytes]], piece: bytes) -> None:
        if self._part is not None and piece:
            made.append((self._part, piece))
        elif self._part is None and piece.strip():
            raise InvalidRequest("the body must begin with the boundary that content-type names.")

    def _after_border(self) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer.startswith(b"--"):
            self._state = "ended"
            return True
        if not self._buffer.startswith(b"\r\n"):
            raise InvalidRequest("the body has a boundary in the middle of a line.")
        self._buffer = self._buffer[2:]
        self._state = "head"
        return True

    def _head(self, made: list[tuple[Part, bytes]]) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_PART_HEAD:
                raise InvalidRequest(f"a part's head may have {MAX_PART_HEAD} bytes.")
            return False
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"a form may have {MAX_PARTS} parts.")
        self._part = _part(self._buffer[:end])
        made.append((self._part, b""))
        self._buffer = self._buffer[end + 4 :]
        self._state = "content"
        return True


def _part(head: bytes) -> Part:
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            values = {key.lower(): _unquoted(quoted, bare) for key, quoted, bare in _PARAMETER.findall(value)}
            if values.get("name"):
                return Part(values["name"], values.get("filename"))
    raise InvalidRequest("every part of the form must have a content-disposition with a name.")


def _unquoted(quoted: str, bare: str) -> str:
    text = re.sub(r"\\(.)", r"\1", quoted) if quoted else bare
    return text.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")
