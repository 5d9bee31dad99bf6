"""Rooms that must never import torch: planning, scheduling and every command's help start at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROOMS = [
    "quire",
    "quire.errors",
    "quire.envs",
    "quire.config",
    "quire.request",
    "quire.presets",
    "quire.metrics",
    "quire.models.config",
    "quire.models.registry",
    "quire.weights.files",
    "quire.weights.hub",
    "quire.plan.memory",
    "quire.plan.hardware",
    "quire.scheduler.scheduler",
    "quire.lora.request",
    "quire.service.adapters",
    "quire.server.options",
    "quire.text.tokenizer",
    "quire.text.chat",
    "quire.text.stream",
    "quire.cli.main",
]


@pytest.mark.parametrize("room", ROOMS)
def test_importing_it_does_not_import_torch(room: str) -> None:
    script = f"import sys, {room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


def test_the_scheduler_knows_no_clock_and_no_chance() -> None:
    script = (
        "import sys; before = set(sys.modules); import quire.scheduler.scheduler; "
        "import pathlib; text = ''.join(p.read_text() for p in pathlib.Path(quire.scheduler.__path__[0]).glob('*.py')); "
        "sys.exit(any(word in text for word in ('import time', 'import random', 'open(', 'import torch')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
