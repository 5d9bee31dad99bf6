"""Which file of packed weights belongs to a start, where such files are kept, and how many. Knows no torch.

A file belongs to one state of one checkpoint's files, one form of the weights and one state of the code that makes it. The
name says all of that, so a checkpoint that changed is never served from an old file: it has another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire import envs
from quire.log import logger
from quire.weights.files import checkpoint_files, tensor_headers
from quire.weights.packed_file import Damaged, Reading, being_written, clear_parts, write

log = logger(__name__)

OFF, AUTO = "off", "auto"
SUFFIX = ".packed"
LAYOUT = 2
"""Of what the kernels' `pack` makes (csrc/linear.cpp). A new layout needs a new number: tests/weights holds its bytes."""
_MAKERS = ("quant", "models", "weights", "ops/cpu")
# Readings that began before their model was there to take them.
_begun: dict[Path, Reading] = {}


@dataclass(frozen=True)
class PackedCache:
    """The place of one start's file."""

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.key}{SUFFIX}"

    def begin(self, threads: int) -> None:
        """Begin to read the file, if there is one and it is not being read."""
        if self.path in _begun:
            return
        try:
            _begun[self.path] = Reading(self.path, self.key, threads)
        except FileNotFoundError:
            return
        except (Damaged, OSError) as error:
            self.refuse(error)

    def fetch(self) -> tuple[Mapping[str, Any], Any] | None:
        """(what the writer said, the data) of the file that `begin` has begun to read; None if there is none."""
        reading = _begun.pop(self.path, None)
        if reading is None:
            return None
        try:
            found = reading.result()
        except Damaged as error:
            self.refuse(error)
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)  # used now: the files that go first are those that were not used for longest
        return found

    def refuse(self, reason: object) -> None:
        """Take away a file that cannot be used, so that it is made again."""
        log.warning("the packed weights in %s are not used and made again: %s", self.folder, reason)
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def keep(self, facts: Mapping[str, Any], tensors: Sequence[memoryview]) -> None:
        """Write the file; whatever prevents it is only logged."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            clear_parts(self.folder)
            size = sum(map(len, tensors))
            if self.path.exists() or being_written(self.folder, self.key) or not self._make_room(size):
                return
            write(self.path, self.key, facts, tensors)
            log.info("kept the packed weights for the next start: %.2f GB in %s", size / 1e9, self.folder)
        except OSError as error:
            log.warning("the packed weights could not be kept in %s: %s", self.folder, error.strerror)

    def _make_room(self, size: int) -> bool:
        most = envs.packed_cache_bytes()
        if size > most or size > shutil.disk_usage(self.folder).free // 2:
            log.info(
                "the packed weights (%.2f GB) are not kept: they may take QUIRE_PACKED_CACHE_BYTES (%.2f GB) "
                "and half of the disk's free space",
                *(size / 1e9, most / 1e9),
            )
            return False
        left = sum(one.size for one in entries(self.folder))
        for one in entries(self.folder):
            if left + size > most:
                one.path.unlink(missing_ok=True)
                left -= one.size
        return True


@dataclass(frozen=True)
class Entry:
    """A file of the cache; used: when it last was, seconds since 1970."""

    path: Path
    size: int
    used: float


def entries(folder: Path) -> list[Entry]:
    """The files in `folder`, the one that was not used for longest first."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            facts = path.stat()
            found.append(Entry(path, facts.st_size, facts.st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def folder_of(wish: str) -> Path | None:
    """Where the files are for EngineConfig.packed_cache; None: nowhere."""
    if wish == OFF:
        return None
    return envs.cache_dir() / "packed" if wish == AUTO else Path(wish).expanduser()


def packed_cache(wish: str, checkpoint: Path, dtype: str, quantization: str | None) -> PackedCache | None:
    """The place for the weights of `checkpoint` in that form. None: none is wished."""
    folder = folder_of(wish)
    if folder is None:
        return None
    envs.packed_cache_bytes()  # what is wrong with it is said now, not when a file has been made
    return PackedCache(folder, key_of(checkpoint, f"{dtype} {quantization}"))


def key_of(checkpoint: Path, form: str) -> str:
    """Of the checkpoint's state (ctime too: nobody sets that back), the form, the layout and the code that makes it."""
    digest = hashlib.sha256(f"{LAYOUT} {form} {_makers()}".encode() + (checkpoint / "config.json").read_bytes())
    for path in checkpoint_files(checkpoint):
        headers = sorted(tensor_headers(path).items()) if path.suffix == ".safetensors" else []
        facts = path.stat()
        digest.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino} {headers}".encode())
    return digest.hexdigest()[:40]


def _makers() -> list[tuple[str, int, int]]:
    """The state of the code that makes packed weights of a checkpoint."""
    package = Path(__file__).parents[1]
    files = sorted(path for room in _MAKERS for path in (package / room).glob("*.py"))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
