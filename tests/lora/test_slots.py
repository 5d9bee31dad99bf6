"""Rows of several adapters and of the base in one batch: each row is what it is alone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import peft
import pytest
import torch
from torch import Tensor, nn

from quire import ops
from quire.assemble import assemble
from quire.layers.linear import Linear, products
from quire.lora.config import LoraConfig
from quire.lora.dropout import Dropout
from quire.lora.new import new_adapter
from quire.lora.parts import Adapter, ModulePart
from quire.lora.slots import Slots
from quire.lora.sockets import LinearSocket, PlainSocket
from quire.models.config import read_model_config
from quire.models.decoder import CausalLM
from quire.ops import reference
from quire.ops.weights import LoraWeight
from tests.lora.cases import SEQUENCES, batch
from tests.lora.conftest import Base

KINDS = {
    "plain": LoraConfig(r=4, lora_alpha=8),
    "few": LoraConfig(r=2, target_modules=("q_proj", "down_proj"), layers_to_transform=(1,)),
    "dora": LoraConfig(r=3, target_modules=("v_proj", "o_proj", "embed_tokens"), use_dora=True),
    "biased": LoraConfig(r=4, target_modules=("q_proj", "up_proj"), lora_bias=True, bias="all"),
    "whole": LoraConfig(r=5, target_modules=("k_proj",), modules_to_save=("lm_head", "embed_tokens", "down_proj")),
    "norms": LoraConfig(r=2, target_modules=("v_proj",), modules_to_save=("norm", "layernorm")),
    "tokens": LoraConfig(r=1, target_modules=("lm_head", "embed_tokens"), trainable_token_indices=(5, 3, 44)),
}


def random_adapter(model: CausalLM, config: LoraConfig, seed: int) -> Adapter:
    """A frozen adapter of which no number is nothing."""
    adapter = new_adapter(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return adapter.frozen()


@torch.no_grad()
def logits(model: CausalLM, slots: list[int] | None) -> list[Tensor]:
    """Of each sequence, with each in its slot."""
    rows = batch(slots or [-1] * len(SEQUENCES))
    rows = rows if slots else replace(rows, adapters=None)
    return list(model.logits(model(rows), rows.adapters).split([len(tokens) for tokens in SEQUENCES]))


@pytest.mark.parametrize("form", ["dense", "packed", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kinds", [("plain", "few"), ("plain", "dora"), ("biased", "whole"), ("tokens", "plain"), ("norms", "dora")]
)
def test_a_row_is_the_same_alone_and_beside_others(
    kinds: tuple[str, str], dtype: str, form: str, base_of: Callable[[str], Base]
) -> None:
    folder, _ = base_of("llama-biases")
    model = assemble(
        folder, read_model_config(folder), dtype, "int8" if form == "int8" else None, keep_dense=form == "dense"
    )
    base = logits(model, None)
    slots = Slots(model)
    first, second = (slots.take() for _ in kinds)
    for slot, kind in zip((first, second), kinds, strict=True):
        slots.place(slot, random_adapter(model, KINDS[kind], slot))
    mixed = logits(model, [second, -1, first])
    assert torch.equal(mixed[1], base[1])
    assert not torch.equal(mixed[0], base[0])
    assert not torch.equal(mixed[2], base[2])
    assert torch.equal(logits(model, [first, first, first])[2], mixed[2])
    assert torch.equal(logits(model, [second, second, second])[0], mixed[0])
    slots.give_back(second)  # the other one is untouched by what becomes of its neighbour
    assert torch.equal(logits(model, [-1, -1, first])[2], mixed[2])
    slots.give_back(first)
    assert all(module.adapter is None for module in model.modules() if hasattr(module, "adapter"))
    assert all(torch.equal(one, other) for one, other in zip(logits(model, [0, 1, 0]), base, strict=True))


def test_the_smallest_free_slot_is_taken_and_a_place_can_be_filled_anew(base_of: Callable[[str], Base]) -> None:
    _, model = base_of("qwen3")
    slots = Slots(model)
    assert [slots.take() for _ in range(3)] == [0, 1, 2]
    slots.give_back(1)
    slots.give_back(0)
    assert [slots.take() for _ in range(3)] == [0, 1, 3]
    one, other = (random_adapter(model, KINDS["plain"], seed) for seed in (1, 2))
    slots.place(0, one)
    of_one = logits(model, [0, 0, 0])
    slots.place(0, other)
    assert not torch.equal(logits(model, [0, 0, 0])[0], of_one[0])
    slots.place(0, one)
    assert all(torch.equal(a, b) for a, b in zip(logits(model, [0, 0, 0]), of_one, strict=True))
    for slot in range(4):
        slots.give_back(slot)
    with pytest.raises(AssertionError):
        slots.place(0, one)


def test_what_training_writes_is_what_the_next_step_reads(base_of: Callable[[str], Base]) -> None:
    _, model = base_of("qwen3")
    slots = Slots(model)
    for kind in ("plain", "dora", "norms"):
        adapter = random_adapter(model, KINDS[kind], 3).trained_further()
        slot = slots.take()
        slots.place(slot, adapter)
        before = logits(model, [slot] * 3)
        with torch.no_grad():
            for tensor in adapter.tensors().values():
                tensor.mul_(1.25)
        after = logits(model, [slot] * 3)
        assert not torch.equal(before[0], after[0])
        # Served from a frozen copy, whose norms are computed once, it gives the bits that training sees.
        slots.place(slot, adapter.frozen())
        assert all(torch.equal(one, other) for one, other in zip(logits(model, [slot] * 3), after, strict=True))
        slots.give_back(slot)


def theirs(linear: Linear, part: ModulePart) -> nn.Module:
    """PEFT's layer with the same numbers."""
    plain = nn.Linear(linear.inputs, linear.outputs, bias=linear.bias is not None)
    config = peft.LoraConfig(r=part.rank, lora_alpha=part.scale * part.rank, target_modules=["one"])
    layer = peft.get_peft_model(nn.ModuleDict({"one": plain}), config).base_model.model["one"]
    with torch.no_grad():
        layer.base_layer.weight.copy_(linear.weight)
        if linear.bias is not None:
            layer.base_layer.bias.copy_(linear.bias)
        layer.lora_A.default.weight.copy_(part.a)
        layer.lora_B.default.weight.copy_(part.b.t())
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_the_bits_of_pefts_where_sums_are_exact(bias: bool) -> None:
    """Small whole numbers over powers of two: every order of summation has the same result."""
    generator = torch.Generator().manual_seed(0)

    def dyadic(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float() / 8

    linear = Linear(96, 80, bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(dyadic(*parameter.shape))
    part = ModulePart(dyadic(8, 96), dyadic(8, 80), 2.0)
    x = dyadic(23, 96)
    linear.adapter = PlainSocket(ops.lora_table([LoraWeight(part.a, part.b, part.scale)]))
    with torch.no_grad():
        assert torch.equal(linear(x, torch.zeros(23, dtype=torch.int32)), theirs(linear, part)(x))


def test_a_layer_gives_pefts_bits_by_the_reference_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any numbers: the same products in the same order. (The native kernels sum in an order of their own, and a BLAS in
    one that goes by the number of rows, which is 16 at a time in the reference.)"""
    rows = 16
    monkeypatch.setattr("quire.ops.selected", lambda: reference)
    generator = torch.Generator().manual_seed(0)
    linear = Linear(160, 96)
    part = ModulePart(torch.randn(16, 160, generator=generator) / 12, torch.randn(16, 96, generator=generator), 1.7)
    x = torch.randn(rows, 160, generator=generator)
    linear.adapter = PlainSocket(ops.lora_table([LoraWeight(part.a, part.b, part.scale)]))
    with torch.no_grad():
        assert torch.equal(linear(x, torch.zeros(rows, dtype=torch.int32)), theirs(linear, part)(x))


def test_linears_of_one_input_are_taken_together_to_the_same_bits(base_of: Callable[[str], Base]) -> None:
    folder, _ = base_of("llama-biases")
    model = assemble(folder, read_model_config(folder), "float32")
    slots = Slots(model)
    for config in (KINDS["few"], KINDS["plain"], LoraConfig(r=2, target_modules=("q_proj",), lora_bias=True)):
        slots.place(slots.take(), random_adapter(model, config, 7))
    x = torch.randn(9, 48)
    rows = torch.tensor([0, 1, -1, 2, 1, 0, 2, -1, 0], dtype=torch.int32)
    for layer in model.model.layers:
        attention = layer.self_attn
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        assert isinstance(linears[0].adapter, LinearSocket)
        assert isinstance(linears[1].adapter, PlainSocket)
        for some in (linears, linears[1:], linears[::2]):
            for ours, alone in zip(products(x, rows, *some), [linear(x, rows) for linear in some], strict=True):
                assert torch.equal(ours, alone)


def test_dropout_follows_from_its_key_alone(base_of: Callable[[str], Base]) -> None:
    _, model = base_of("qwen3")
    config = replace(KINDS["plain"], lora_dropout=0.4)
    adapter = random_adapter(model, config, 5).trained_further()
    adapter = replace(adapter, config=config)
    slots = Slots(model)
    other, slot = slots.take(), slots.take()
    slots.place(other, random_adapter(model, KINDS["few"], 1))
    slots.place(slot, adapter)
    whole = logits(model, [slot, slot, -1])
    slots.drop(slot, "seed 1, step 1")
    dropped = logits(model, [slot, slot, -1])
    assert not torch.equal(dropped[0], whole[0])
    assert all(torch.equal(a, b) for a, b in zip(logits(model, [slot, slot, -1]), dropped, strict=True))
    # Beside rows of another slot and of the base: the same numbers fall out of this one's.
    shifted = logits(model, [slot, slot, other])
    assert torch.equal(shifted[0], dropped[0])
    assert torch.equal(shifted[1], dropped[1])
    assert torch.equal(logits(model, [-1, -1, -1])[2], dropped[2])
    slots.drop(slot, "seed 1, step 2")
    assert not torch.equal(logits(model, [slot, slot, -1])[0], dropped[0])
    slots.drop(slot, None)
    assert all(torch.equal(a, b) for a, b in zip(logits(model, [slot, slot, -1]), whole, strict=True))
    for one in (slot, other):
        slots.give_back(one)


def test_a_mask_keeps_its_share_and_the_mean() -> None:
    dropout = Dropout(0.3)
    dropout.key = "1"
    mask = dropout.mask("some.module", 1000, 501)
    kept = (mask > 0).float().mean().item()
    assert abs(kept - 0.7) < 4 * (0.3 * 0.7 / mask.numel()) ** 0.5
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert not torch.equal(mask, dropout.mask("other.module", 1000, 501))
    assert torch.equal(mask[:10], dropout.mask("some.module", 10, 501))
