"""Runs command lines in this process, or in a fresh one where imports and start-up count."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from quire.cli.main import run


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


class Quire:
    """`quire(*words)` gives code and output."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *words: str) -> Ran:
        self._capture.readouterr()
        code = run(list(words))
        captured = self._capture.readouterr()
        return Ran(code, captured.out, captured.err)


def fresh(*words: str, input: str | None = None) -> Ran:
    """The command in a new process."""
    done = subprocess.run([sys.executable, "-m", "quire.cli", *words], capture_output=True, text=True, input=input, timeout=120)
    return Ran(done.returncode, done.stdout, done.stderr)
