"""One way to run a command line."""

from __future__ import annotations

import pytest

from tests.cli.running import Quire


@pytest.fixture
def quire(capsys: pytest.CaptureFixture[str]) -> Quire:
    return Quire(capsys)
