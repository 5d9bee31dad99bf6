"""Python's standard library as text: the source of this Python, file by file, and what is held out of it.

Left out: tests, generated tables, files with a licence notice of their own, and anything outside the library proper.
Knows files only; nothing is imported or run.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from pathlib import Path

LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "__pycache__",
    "turtledemo",
    "ensurepip",
    "lib-dynload",
    "idlelib",
    "pgen2",
}
NOTICE = re.compile(r"copyright|licen[cs]e|permission to", re.IGNORECASE)
NOTICE_LINES = 60
LONGEST_LINE = 200
HELD_OUT_SHARE = 25


def library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _wanted(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return not any(part in LEFT_OUT or part.startswith(("_sysconfigdata", "config-")) for part in parts)


def documents(root: Path | None = None) -> list[tuple[str, str]]:
    """(name, text) of every file, in the order of the names, which is the same on every machine with this Python."""
    root = root or library_root()
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if not _wanted(path, root):
            continue
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        lines = text.splitlines()
        if len(text) < 200 or NOTICE.search("\n".join(lines[:NOTICE_LINES])) or max(map(len, lines)) > LONGEST_LINE:
            continue
        found.append((path.relative_to(root).as_posix(), text))
    return found


def split(files: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training files and held-out files; the name decides, so that adding a file moves no other."""

    def is_held_out(name: str) -> bool:
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % HELD_OUT_SHARE == 0

    return [file for file in files if not is_held_out(file[0])], [file for file in files if is_held_out(file[0])]


def digest(files: list[tuple[str, str]]) -> str:
    """One short name for exactly these files with exactly this text."""
    total = hashlib.blake2b(digest_size=8)
    for name, text in files:
        total.update(f"{name}\0{text}\0".encode())
    return total.hexdigest()
