"""Tiny models of the parity table, as folders and as Quire's dense trees, once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quire.assemble import assemble
from quire.models.config import read_model_config
from quire.models.decoder import CausalLM
from tests.parity.families import BY_NAME, reference_model, save

Base = tuple[Path, CausalLM]


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The folder of a variant and Quire's model of it, its weights as parameters."""
    made: dict[str, Base] = {}

    def base_of(name: str) -> Base:
        if name not in made:
            folder = save(reference_model(BY_NAME[name]), tmp_path_factory.mktemp(name))
            made[name] = folder, assemble(folder, read_model_config(folder), "float32", keep_dense=True)
        return made[name]

    return base_of
