"""Tests that look into packed weights run on the reference operations, where a form is its own packed weight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quire.ops.select import selected


@pytest.fixture
def reference_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The reference operations, whatever the environment says."""
    monkeypatch.setenv("QUIRE_OPS", "reference")
    selected.cache_clear()
    yield
    monkeypatch.undo()
    selected.cache_clear()
