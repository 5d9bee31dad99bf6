"""Quantized checkpoints through the whole loader: the logits of the dense model that each stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire import LLM, SamplingParams
from quire.assemble import assemble
from quire.batch import packed
from quire.errors import ConfigError, ModelError
from quire.layers.linear import Linear
from quire.models.config import read_model_config
from quire.models.decoder import CausalLM
from quire.quant.packing import packed_weights
from tests.conftest import write_model
from tests.quant.checkpoints import CONFIGS, configured, quantized

TOKENS = [5, 9, 200, 31, 7, 250, 18, 44]


def load(folder: Path, quantization: str | None = None, dtype: str = "float32") -> CausalLM:
    return assemble(folder, read_model_config(folder), dtype, quantization)


@torch.inference_mode()
def logits(model: CausalLM) -> Tensor:
    return model.logits(model(packed([TOKENS])))


def distance(got: Tensor, expected: Tensor) -> float:
    """Mean error over the spread of what is expected."""
    return float((got - expected).abs().mean() / expected.std())


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_dense_model(kind: str, tmp_path: Path) -> None:
    stored, plain = quantized(kind, tmp_path)
    model, dense = load(stored), load(plain)
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert set(packed_weights(model)) >= linears - {"lm_head"}
    # The weights are the same numbers; products with int8 and int4 round their activations to 8 bits.
    assert distance(logits(model), logits(dense)) < (0.06 if "fp8" not in kind else 1e-5)
    assert distance(logits(load(write_model(tmp_path / "other", seed=9))), logits(dense)) > 0.5


@pytest.mark.usefixtures("reference_ops")
def test_weights_are_exactly_those_stored(tmp_path: Path) -> None:
    stored, plain = quantized("gptq-act-order", tmp_path)
    from quire import ops

    dense = load_file(plain / "model.safetensors")
    for name, weight in packed_weights(load(stored)).items():
        if name != "lm_head":
            rows = torch.arange(len(dense[f"{name}.weight"]))
            assert torch.equal(ops.packed_rows(rows, weight, torch.float32), dense[f"{name}.weight"]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_dense_head_beside_quantized_layers(dtype: str, tmp_path: Path) -> None:
    stored, plain = quantized("gptq", tmp_path, tie_word_embeddings=True)
    model, dense = load(stored, dtype=dtype), load(plain)
    assert model.table.weight is model.lm_head.weight
    assert distance(logits(model), logits(dense)) < (0.06 if dtype == "float32" else 0.12)


def test_shards_may_cut_a_linear(tmp_path: Path) -> None:
    stored, _ = quantized("awq", tmp_path)
    expected = logits(load(stored))
    weights = load_file(stored / "model.safetensors")
    (stored / "model.safetensors").unlink()
    places = {}
    for number, part in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, stored / file)
        places |= dict.fromkeys(part, file)
    (stored / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(logits(load(stored)), expected)


def test_damage_and_contradiction_are_one_clear_error(tmp_path: Path) -> None:
    stored, plain = quantized("awq", tmp_path)
    with pytest.raises(ConfigError, match="must be 'awq' or not given for this model, got 'gptq'"):
        load(stored, "gptq")
    with pytest.raises(ConfigError, match="got 'compressed-tensors', which needs a checkpoint"):
        load(plain, "compressed-tensors")
    assert torch.equal(logits(load(stored, "awq")), logits(load(stored)))
    with pytest.raises(ModelError, match=r"qweight has shape .*the configuration says"):
        load(configured(stored, quant_method="gptq"))
    configured(stored, quant_method="awq", bits=3)
    with pytest.raises(ModelError, match=r"quantization_config\.bits must be 4, got 3"):
        LLM(str(stored))
    configured(stored, bits=4)
    weights = load_file(stored / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.qzeros"
    save_file({key: value for key, value in weights.items() if key != name}, stored / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj has no qzeros"):
        load(stored)
    save_file(weights | {"model.layers.1.mlp.up_proj.odd": torch.ones(1)}, stored / "model.safetensors")
    with pytest.raises(ModelError, match=r"unknown: model\.layers\.1\.mlp\.up_proj\.odd"):
        load(stored)
    save_file(weights, plain / "model.safetensors")
    with pytest.raises(ModelError, match=r"quantized weights, but config\.json has no quantization_config"):
        load(plain)


@pytest.mark.parametrize("kind", ["awq", "ct-fp8"])
def test_generates_through_the_front_door(kind: str, tmp_path: Path) -> None:
    stored, _ = quantized(kind, tmp_path)
    llm = LLM(str(stored), dtype="float32")
    (output,) = llm.generate([[5, 9, 200]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8
