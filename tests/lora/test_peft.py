"""Quire's adapters against the real PEFT: logits, gradients and a step of AdamW, folders both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.batch import packed
from quire.lora.adapter import Adapter, read_adapter, write_adapter
from quire.lora.dropout import Dropout
from quire.lora.keys import tensors_of
from quire.lora.slots import Slots
from tests.lora.cases import BY_NAME, CASES, SEQUENCES, Case, loaded_by_peft, made_by_peft, our_logits, their_logits
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


# PEFT's table and head are two parameters over one memory here, which its step changes twice.
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "embedding-tied-both"], ids=lambda case: case.name)
def test_gradients_and_a_step_of_adamw_are_those_of_peft(
    case: Case, base_of: Callable[[str], Base], tmp_path: Path
) -> None:
    folder, model = base_of(case.base)
    theirs = made_by_peft(case, folder)
    theirs.save_pretrained(tmp_path)
    ours = read_adapter(tmp_path, model).trained_further()
    loss(our_logits(model, ours)).backward()
    loss(their_logits(theirs)).backward()
    expected = {key_of(name): value for name, value in theirs.named_parameters() if value.requires_grad}
    gradients = keyed(ours, lambda tensor: tensor.grad, case)
    if case.name == "saved-tied-both":
        del gradients["base_model.model.lm_head.weight"]  # the table's once more
    assert set(gradients) == set(expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key].grad, rtol=1e-3, atol=1e-5)
    for parameters in (list(ours.tensors().values()), list(expected.values())):
        torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.1).step()
    values = keyed(ours, lambda tensor: tensor.detach(), case)
    for key, value in ((key, values[key]) for key in gradients):
        # Where a gradient is nearly nothing, AdamW makes a whole step of its rounding's sign.
        clear = (gradients[key].abs() > 1e-5) | ((gradients[key] == 0) & (expected[key].grad == 0))
        torch.testing.assert_close(value[clear], expected[key].detach()[clear], rtol=0, atol=1e-5)


def loss(logits: Tensor) -> Tensor:
    labels = torch.tensor([tokens[(row + 1) % len(tokens)] for tokens in SEQUENCES for row in range(len(tokens))])
    return torch.nn.functional.cross_entropy(logits, labels)


def key_of(name: str) -> str:
    """What PEFT calls a parameter in its file."""
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def keyed(adapter: Adapter, of: Callable[[Tensor], Tensor], case: Case) -> dict[str, Tensor]:
    """Something of each tensor of an adapter under the names and in the shapes that PEFT has in memory."""
    parameters = case.options.get("target_parameters") or adapter.config.target_parameters
    values = {id(tensor): of(tensor) for tensor in adapter.tensors().values()}
    parts = {
        module: replace(part, **{name: values[id(tensor)] for name, tensor in part.tensors()})
        for module, part in adapter.parts.items()
    }
    named = tensors_of(parts, replace(adapter.config, target_parameters=parameters))
    return {key.replace(".block_sparse_moe.", ".mlp."): tensor for key, tensor in named.items()}


class GivenDropout(torch.nn.Module):
    """In the place of PEFT's dropout: what Quire's drops."""

    def __init__(self, name: str, dropout: Dropout) -> None:
        super().__init__()
        self.name, self.dropout = name, dropout

    def forward(self, x: Tensor) -> Tensor:
        return x * self.dropout.mask(self.name, x.shape[-2], x.shape[-1])


@pytest.mark.parametrize("name", ["llama-biases", "dora", "dora-biases"])
def test_dropout_is_where_pefts_is(name: str, base_of: Callable[[str], Base], tmp_path: Path) -> None:
    case = replace(BY_NAME[name], options=BY_NAME[name].options | {"lora_dropout": 0.3})
    folder, model = base_of(case.base)
    theirs = made_by_peft(case, folder).train()
    theirs.save_pretrained(tmp_path)
    dropout = Dropout(0.3)
    dropout.key = "7"
    for path, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = GivenDropout(path, dropout)
    ours = read_adapter(tmp_path, model).trained_further()
    slots = Slots(model)
    slot = slots.take()
    slots.place(slot, ours)
    slots.drop(slot, "7")
    rows = packed(SEQUENCES[:1])
    rows = replace(rows, adapters=torch.full((len(rows.tokens),), slot, dtype=torch.int32))
    logits, expected = model.logits(model(rows), rows.adapters), theirs(torch.tensor(SEQUENCES[:1])).logits[0]
    slots.give_back(slot)
    torch.testing.assert_close(logits, expected, **NEAR)
    (logits.square().mean() + expected.square().mean()).backward()
    parameters = {key_of(key): value.grad for key, value in theirs.named_parameters() if value.requires_grad}
    for key, gradient in keyed(ours, lambda tensor: tensor.grad, case).items():
        torch.testing.assert_close(gradient, parameters[key], rtol=1e-3, atol=1e-4)
