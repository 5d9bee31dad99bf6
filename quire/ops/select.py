"""Chooses one implementation of the operations for this process: `QUIRE_OPS`, or the best that the machine can run."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from quire import envs
from quire.errors import ConfigError

IMPLEMENTATIONS = ("reference", "cpu", "plain")


@functools.cache
def selected() -> ModuleType:
    """The module that holds the operations under their names."""
    name = envs.ops()
    if name == "auto":
        name = IMPLEMENTATIONS[0]
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"QUIRE_OPS must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {name!r}.")
    return importlib.import_module(f"quire.ops.{name}")
