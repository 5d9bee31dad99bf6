"""Quire's adapters against the real PEFT: logits, gradients and a step of AdamW, folders both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quire.lora.adapter import read_adapter, write_adapter
from tests.lora.cases import CASES, Case, loaded_by_peft, made_by_peft, our_logits, their_logits
from tests.lora.conftest import Base

pytestmark = pytest.mark.filterwarnings("ignore")
NEAR = {"rtol": 1e-4, "atol": 1e-4}
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cases
def test_what_peft_saves_gives_the_same_logits_here(case: Case, base_of: Callable[[str], Base], tmp_path: Path) -> None:
    folder, model = base_of(case.base)
    theirs = made_by_peft(case, folder)
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, model)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(model, adapter), their_logits(theirs), **NEAR)


@cases
def test_what_quire_saves_gives_the_same_logits_in_peft(case: Case, base_of: Callable[[str], Base], tmp_path: Path) -> None:
    folder, model = base_of(case.base)
    made_by_peft(case, folder).save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs", model)
    write_adapter(tmp_path / "ours", adapter, base_name=str(folder))
    assert read_adapter(tmp_path / "ours", model).digest == adapter.digest
    with torch.no_grad():
        torch.testing.assert_close(
            their_logits(loaded_by_peft(folder, tmp_path / "ours")), our_logits(model, adapter), **NEAR
        )
