"""Checkpoints that are whole or not there: files, synchronized, then a manifest of their hashes, then one rename.

A folder whose manifest is missing or does not fit is as if it were not there. Knows file names, bytes and tensors, no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.log import logger

log = logger(__name__)

NAME, MANIFEST, STATE, TENSORS = "checkpoint-", "manifest.json", "training_state.json", "training_state.safetensors"
PARTIAL = ".partial-"


def path_of(folder: Path, step: int) -> Path:
    return folder / f"{NAME}{step}"


def write(folder: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor], adapter: Any) -> Path:
    """Write checkpoint `step` below `folder`; adapter: called with the new folder, to write the adapter's own files."""
    final, working = path_of(folder, step), folder / f"{PARTIAL}{step}"
    shutil.rmtree(working, ignore_errors=True)
    adapter(working)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, working / TENSORS)
    (working / STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    names = sorted(path.name for path in working.iterdir())
    for name in names:
        synchronize(working / name)
    manifest = {name: _digest(working / name) for name in names}
    (working / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    synchronize(working / MANIFEST)
    synchronize(working)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(working, final)
    synchronize(folder)
    return final


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of the latest step; what a sudden end left half written is removed."""
    for working in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(working, ignore_errors=True)
    for step in sorted(steps(folder), reverse=True):
        path = path_of(folder, step)
        if is_whole(path):
            return path
        log.warning("%s is damaged and is passed over.", path.name)
    return None


def steps(folder: Path) -> list[int]:
    """The steps that have a folder, ascending."""
    names = [path.name.removeprefix(NAME) for path in folder.glob(f"{NAME}*")]
    return sorted(int(name) for name in names if name.isdigit())


def is_whole(path: Path) -> bool:
    """Whether the manifest is there and every file has the hash that it says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest) and all(_digest(path / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state, tensors) of a whole checkpoint."""
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8")), load_file(path / TENSORS)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None


def prune(folder: Path, keep: int, also: Iterable[int]) -> None:
    """Remove all but the latest `keep` checkpoints and those of the steps in `also`."""
    listed = steps(folder)
    kept = {*listed[-keep:], *also}
    for step in listed:
        if step not in kept:
            going = folder / f"{PARTIAL}gone-{step}"
            os.replace(path_of(folder, step), going)  # from one moment to the next it is no checkpoint any more
            shutil.rmtree(going, ignore_errors=True)


def synchronize(path: Path) -> None:
    """Have the system write it down."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
