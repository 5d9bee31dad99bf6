"""Fresh adapters: they start as PEFT's do, compute the base, and follow from seed and module alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import scipy.stats
import torch

from quire.assemble import assemble
from quire.errors import AdapterError
from quire.lora.adapter import read_adapter, write_adapter
from quire.lora.config import LoraConfig, parse_lora_config
from quire.lora.new import new_adapter
from quire.models.config import read_model_config
from tests.lora.cases import CASES, Case, loaded_by_peft, our_logits, their_logits
from tests.lora.conftest import Base
from tests.parity.families import BY_NAME as FAMILIES
from tests.parity.families import reference_model

pytestmark = pytest.mark.filterwarnings("ignore")
# Experts by their old names have an A of their own here, and their routers none; a tied head shares the table's A and B, which
# PEFT counts twice.
COUNTED_OTHERWISE = (
    "moe-old-names", "moe-old-names-mixtral", "moe-all-linear", "moe-all-linear-mixtral", "embedding-tied-both",
)  # fmt: skip
NEAR = {"rtol": 1e-4, "atol": 1e-4}


def config_of(case: Case) -> LoraConfig:
    """The case's configuration as someone would give it to a training run."""
    given = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **case.options}
    return parse_lora_config(json.loads(json.dumps(given)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_new_adapter_is_the_base_has_pefts_shapes_and_is_read_by_peft(
    case: Case, base_of: Callable[[str], Base], tmp_path: Path
) -> None:
    folder, model = base_of(case.base)
    adapter = new_adapter(model, config_of(case), 3)
    assert all(tensor.requires_grad and tensor.is_contiguous() for tensor in adapter.tensors().values())
    theirs = peft.get_peft_model(reference_model(FAMILIES[case.base]), case.config()).eval()
    count = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    if case.name not in COUNTED_OTHERWISE:
        assert sum(tensor.numel() for tensor in adapter.tensors().values()) == count
    with torch.no_grad():
        before = our_logits(model, adapter)
        torch.testing.assert_close(before, their_logits(theirs), **NEAR)
        for tensor in adapter.tensors().values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
        write_adapter(tmp_path / "new", adapter)
        changed = our_logits(model, adapter)
        assert (changed - before).abs().max() > 0.01
        torch.testing.assert_close(their_logits(loaded_by_peft(folder, tmp_path / "new")), changed, **NEAR)
    assert torch.equal(our_logits(model, read_adapter(tmp_path / "new", model)), changed)


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_numbers_start_in_pefts_distributions(start: bool | str, base_of: Callable[[str], Base]) -> None:
    _, model = base_of("qwen3")
    options: dict[str, Any] = {"r": 16, "target_modules": ("down_proj", "embed_tokens"), "init_lora_weights": start}
    adapter = new_adapter(model, LoraConfig(**options), 0)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        reference_model(FAMILIES["qwen3"]), peft.LoraConfig(**options | {"target_modules": ["down_proj", "embed_tokens"]})
    )
    expected = {name.replace(".default", ""): value for name, value in theirs.named_parameters() if value.requires_grad}
    part = adapter.parts["model.layers.0.mlp.down_proj"]
    table = adapter.parts["model.embed_tokens"]
    prefix = "base_model.model.model."
    pairs = [
        (part.a, f"{prefix}layers.0.mlp.down_proj.lora_A.weight"),
        (part.b, f"{prefix}layers.0.mlp.down_proj.lora_B.weight"),
        (table.a, f"{prefix}embed_tokens.lora_embedding_A"),
        (table.b, f"{prefix}embed_tokens.lora_embedding_B"),
    ]
    for ours, key in pairs:
        sample, other = ours.detach().flatten().numpy(), expected[key].detach().flatten().numpy()
        assert scipy.stats.ks_2samp(sample, other).pvalue > 1e-3, key
    bound = 1 / math.sqrt(80)
    if start != "gaussian":
        assert part.a.abs().max() <= bound


def test_a_module_starts_the_same_whatever_else_there_is(base_of: Callable[[str], Base]) -> None:
    _, model = base_of("qwen3")
    one = new_adapter(model, LoraConfig(target_modules=("q_proj",)), 7)
    more = new_adapter(model, LoraConfig(target_modules="all-linear", lora_alpha=99), 7)
    other = new_adapter(model, LoraConfig(target_modules=("q_proj",)), 8)
    for name, part in one.parts.items():
        assert torch.equal(part.a, more.parts[name].a)
        assert not torch.equal(part.a, other.parts[name].a)
    layers = [part.a for part in one.parts.values()]
    assert not torch.equal(layers[0], layers[1])
    assert one.digest == new_adapter(model, LoraConfig(target_modules=("q_proj",)), 7).digest


@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_whole_modules_magnitudes_and_tokens_start_as_a_packed_base_has_them(
    form: str | None, base_of: Callable[[str], Base]
) -> None:
    folder, dense = base_of("qwen3")
    model = assemble(folder, read_model_config(folder), "float32", form)
    options = {"modules_to_save": ("lm_head",), "trainable_token_indices": (4, 9), "use_dora": True}
    adapter = new_adapter(model, LoraConfig(target_modules=("up_proj",), **options), 0)
    head, up, table = (adapter.parts[name] for name in ("lm_head", "model.layers.1.mlp.up_proj", "model.embed_tokens"))
    # Rounded to 4 or 8 bits, a weight is near the one that it was made of.
    near = {"rtol": 0, "atol": 0} if form is None else {"rtol": 0.2, "atol": 0.2}
    torch.testing.assert_close(head.weight.detach(), dense.lm_head.weight, **near)
    torch.testing.assert_close(table.tokens.detach(), dense.model.embed_tokens.weight[[4, 9]], rtol=0, atol=0)
    expected = dense.get_submodule("model.layers.1.mlp.up_proj").weight.norm(dim=1)
    torch.testing.assert_close(up.magnitude.detach(), expected, rtol=1e-6 if form is None else 0.05, atol=0)


@pytest.mark.parametrize(
    "options,field",
    [
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights"),
        ({"target_modules": ("embed_tokens",), "lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ("embed_tokens",), "trainable_token_indices": (1,)}, "trainable_token_indices"),
        ({"target_modules": ()}, None),
    ],
)
def test_what_cannot_start_is_refused(options: dict[str, Any], field: str | None, base_of: Callable[[str], Base]) -> None:
    _, model = base_of("qwen3")
    with pytest.raises(AdapterError) as raised:
        new_adapter(model, LoraConfig(**options), 0)
    assert raised.value.parameter == field


def test_bias_all_takes_the_biases_of_norms_and_linears(base_of: Callable[[str], Base]) -> None:
    _, model = base_of("gpt2")
    adapter = new_adapter(model, LoraConfig(target_modules=("c_attn",), bias="all"), 0)
    biased = {name for name, module in model.named_modules() if getattr(module, "bias", None) is not None}
    assert {name for name, part in adapter.parts.items() if part.bias is not None} == biased
    assert {"transformer.ln_f", "transformer.h.0.ln_1", "transformer.h.0.mlp.c_fc"} <= biased
    whole = new_adapter(model, LoraConfig(target_modules=("c_attn",), modules_to_save=("ln_f",)), 0).parts["transformer.ln_f"]
    assert torch.equal(whole.weight.detach(), model.transformer.ln_f.weight)
    assert torch.equal(whole.bias.detach(), model.transformer.ln_f.bias)
