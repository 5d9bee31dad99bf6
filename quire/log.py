"""Logging: one format, one place. `logger(__name__)` everywhere; nothing is configured until a door calls `setup`."""

from __future__ import annotations

import logging
import sys

from quire import envs

FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"


def logger(name: str) -> logging.Logger:
    """The logger of a module."""
    return logging.getLogger(name)


def setup(level: str | None = None) -> None:
    """Send Quire's log to standard error, once; a second call only changes the level."""
    root = logging.getLogger("quire")
    root.setLevel(level or envs.log_level())
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
