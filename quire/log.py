"""Logging: one format, one place. `logger(__name__)` everywhere; nothing is configured until a door calls `setup`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def progress(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar for long work: yields `advance(amount)`. On a terminal a live bar, elsewhere nothing but the final line."""
    start = time.monotonic()
    if quiet or not sys.stderr.isatty():
        yield lambda amount: None
    else:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda amount: bar.advance(task, amount)
    logger(__name__).info("%s took %.2f s", title, time.monotonic() - start)
