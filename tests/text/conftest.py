"""Every layout of `tokenizer_layouts`, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.text import Tokenizer
from tests.text.tokenizer_layouts import LAYOUTS


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, lay_out in LAYOUTS.items():
        made[name] = tmp_path_factory.mktemp(name)
        lay_out(made[name])
    return made


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_folder(folder) for name, folder in folders.items()}
