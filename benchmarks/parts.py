"""Where a step goes: timers around Quire's seams, each counting its own time without what it calls of the others."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import quire.engine.engine
import quire.engine.llm
import quire.engine.runner
from quire.ops.select import selected
from quire.scheduler.scheduler import Scheduler

MATRICES, ATTENTION = ("linear",), ("paged_attention", "write_kv")
ELEMENTWISE = ("embedding", "rms_norm", "layer_norm", "rope", "activation", "gated_activation")


class _Stack:
    """What is being timed now; an inner part stops the clock of the outer one."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._open: list[str] = []
        self._since = time.perf_counter()

    def enter(self, part: str) -> None:
        self._charge()
        self._open.append(part)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            part = self._open[-1]
            self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now


@contextmanager
def measured(seconds: dict[str, float] | None) -> Iterator[None]:
    """Within, `seconds` gathers time by part; None: nothing is touched."""
    if seconds is None:
        yield
        return
    stack, ops = _Stack(seconds), selected()
    seams: list[tuple[Any, str, str]] = [
        *((ops, name, "matrix products") for name in MATRICES),
        *((ops, name, "attention") for name in ATTENTION),
        *((ops, name, "elementwise") for name in ELEMENTWISE),
        (quire.engine.runner.Runner, "run", "model, between the operations"),
        (quire.engine.runner, "build", "batch"),
        (quire.engine.engine, "sample", "sampling"),
        (Scheduler, "schedule", "scheduler"),
        (Scheduler, "update", "scheduler"),
        (quire.engine.engine.Engine, "step", "engine, the rest"),
        (quire.engine.llm.LLM, "generate", "outside of steps"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in seams]
    try:
        for owner, name, part in seams:
            setattr(owner, name, _timed(getattr(owner, name), part, stack))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _timed(function: Callable[..., Any], part: str, stack: _Stack) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        stack.enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            stack.leave()

    return timed
