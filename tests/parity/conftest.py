"""Every variant of the table once per test session: transformers' model, the folder it wrote, and Quire's model of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from quire.assemble import assemble
from quire.models.config import read_model_config
from quire.models.decoder import CausalLM
from tests.parity.families import BY_NAME, reference_model, save

Pair = tuple[transformers.PreTrainedModel, CausalLM]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[transformers.PreTrainedModel, Path]]:
    made: dict[str, tuple[transformers.PreTrainedModel, Path]] = {}

    def folder_of(name: str) -> tuple[transformers.PreTrainedModel, Path]:
        if name not in made:
            model = reference_model(BY_NAME[name])
            made[name] = model, save(model, tmp_path_factory.mktemp(name))
        return made[name]

    return folder_of


def pairs(folder_of: Callable[[str], tuple[transformers.PreTrainedModel, Path]], *, keep_dense: bool) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair_of(name: str) -> Pair:
        if name not in made:
            reference, folder = folder_of(name)
            made[name] = reference, assemble(folder, read_model_config(folder), "float32", keep_dense=keep_dense)
        return made[name]

    return pair_of


@pytest.fixture(scope="session")
def pair_of(folder_of: Callable[[str], tuple[transformers.PreTrainedModel, Path]]) -> Callable[[str], Pair]:
    """transformers' model and ours as it serves: with packed weights, where the operations pack."""
    return pairs(folder_of, keep_dense=False)


@pytest.fixture(scope="session")
def dense_pair_of(folder_of: Callable[[str], tuple[transformers.PreTrainedModel, Path]]) -> Callable[[str], Pair]:
    """transformers' model and ours with all weights as parameters, which training needs."""
    return pairs(folder_of, keep_dense=True)
