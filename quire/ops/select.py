"""Chooses one implementation of the operations for this process: `QUIRE_OPS`, or the best that the machine can run."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from quire import envs
from quire.errors import ConfigError
from quire.ops.cpu import library

IMPLEMENTATIONS = ("reference", "cpu", "plain")


@functools.cache
def selected() -> ModuleType:
    """The module that holds the operations under their names."""
    name = envs.ops()
    if name == "auto":
        name = "cpu" if library.available() else "reference"
    if name == "cpu" and not library.available():
        raise ConfigError("QUIRE_OPS=cpu needs the native kernels, which were not built: reinstall with a C++ compiler.")
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"QUIRE_OPS must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {name!r}.")
    return importlib.import_module(f"quire.ops.{name}")
