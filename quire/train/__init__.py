"""Training of LoRA adapters on the weights that serve: JSON lines in, PEFT's folder out. `quire.train(...)` is its door.

Uses the same model, operations and chat templates as serving. Knows no engine, no request and no route: a server drives a
run piece by piece (run.py, together.py), and samples come from a function that is handed in.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """This package, which can be called: importing a room puts it under its name where people look for the function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from quire.train.door import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Room
