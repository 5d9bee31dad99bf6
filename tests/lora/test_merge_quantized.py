"""Merging into quantized bases: every stored layout becomes the dense model that it stands for, with the adapter in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.cli.main import run
from quire.errors import ModelError
from quire.lora.adapter import write_adapter
from quire.lora.config import LoraConfig
from quire.lora.merge import PIECE
from quire.lora.parts import Adapter
from quire.merging import merge
from tests.lora.cases import their_logits
from tests.lora.making import tiny_model
from tests.lora.test_merge import by_quire, in_half
from tests.lora.test_slots import random_adapter
from tests.quant.checkpoints import kinds, quantized

pytestmark = pytest.mark.filterwarnings("ignore")
NEAR = {"rtol": 1e-4, "atol": 1e-4}
TARGETS = ("q_proj", "down_proj", "lm_head")


def adapter_for(dense: Path, seed: int = 1, **options: object) -> Adapter:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
    return random_adapter(tiny_model(dense), config, seed)


@pytest.mark.parametrize("kind", kinds())
def test_merged_is_what_peft_merges_into_the_dense_model_that_is_stored(kind: str, tmp_path: Path) -> None:
    base, dense = quantized(kind, tmp_path)
    adapter = adapter_for(dense)
    write_adapter(tmp_path / "adapter", adapter)
    said: list[str] = []
    report = merge(base, adapter, tmp_path / "out", dtype="float32", held_out=2, length=32, say=said.append)
    assert report.dequantized == json.loads((base / "config.json").read_text())["quantization_config"]["quant_method"]
    assert report.lost < 1e-6
    assert any(f"weights are {report.dequantized}; what is written is dense, float32" in line for line in said)
    assert report.drift is not None
    assert report.drift.mean < report.drift.update
    plain = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = their_logits(PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().eval())
        alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        torch.testing.assert_close(their_logits(alone), expected, **NEAR)
    torch.testing.assert_close(by_quire(tmp_path / "out"), expected, **NEAR)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(dense / "model.safetensors").keys()


def test_the_type_is_the_configurations_unless_another_is_named(tmp_path: Path) -> None:
    base, dense = quantized("awq", tmp_path)
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "float16"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "quant_config.json").write_text("{}")
    adapter = adapter_for(dense)
    half = merge(base, adapter, tmp_path / "half", held_out=0)
    brain = merge(base, adapter, tmp_path / "brain", dtype="bfloat16", held_out=0)
    assert (half.dtype, brain.dtype) == ("float16", "bfloat16")
    assert 0 < half.lost < brain.lost < 0.2
    for name, dtype in (("half", torch.float16), ("brain", torch.bfloat16)):
        assert {tensor.dtype for tensor in load_file(tmp_path / name / "model.safetensors").values()} == {dtype}
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["dtype"] == str(dtype).removeprefix("torch.")
        assert "quantization_config" not in written
        assert not (tmp_path / name / "quant_config.json").exists()


def test_only_the_updates_own_rounding_is_reported(tmp_path: Path) -> None:
    """The base's numbers are rounded too; what the adapter loses is measured from where the base arrives."""
    base, dense = quantized("ct-w8a8", tmp_path)
    adapter = adapter_for(dense, target_modules=("q_proj",))
    report = merge(base, adapter, tmp_path / "out", dtype="bfloat16", held_out=0)
    weights, written = load_file(dense / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    wanted = missed = 0.0
    for name, part in adapter.parts.items():
        update = part.scale * (part.b.t() @ part.a)
        arrived = written[f"{name}.weight"].float() - weights[f"{name}.weight"].bfloat16().float()
        wanted, missed = wanted + float(update.square().sum()), missed + float((update - arrived).square().sum())
    assert report.lost == pytest.approx((missed / wanted) ** 0.5, rel=1e-3)


def test_dora_biases_and_norms_find_their_place(tmp_path: Path) -> None:
    base, dense = quantized("gptq-act-order", tmp_path, attention_bias=True)
    adapter = adapter_for(dense, use_dora=True, bias="all", modules_to_save=("norm",))
    write_adapter(tmp_path / "adapter", adapter)
    merge(base, adapter, tmp_path / "out", dtype="float32", held_out=0)
    plain = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = their_logits(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval())
    torch.testing.assert_close(by_quire(tmp_path / "out"), expected, **NEAR)


def test_parts_of_a_linear_may_lie_in_different_files(tmp_path: Path) -> None:
    base, dense = quantized("awq", tmp_path)
    adapter = adapter_for(dense)
    merge(base, adapter, tmp_path / "one", held_out=0)
    tensors = load_file(base / "model.safetensors")
    shards: list[dict[str, Tensor]] = [{}, {}]
    for number, name in enumerate(sorted(tensors)):
        shards[number % 2][name] = tensors[name]
    names = [f"model-{number}-of-00002.safetensors" for number in ("00001", "00002")]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, base / name, metadata={"format": "pt"})
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (base / "model.safetensors").unlink()
    merge(base, adapter, tmp_path / "two", held_out=0)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    base, dense = quantized("awq", tmp_path)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.scales"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj has no scales, which awq weights need"):
        merge(base, adapter_for(dense), tmp_path / "out", held_out=0)
    assert not (tmp_path / "out").exists()


def test_more_rows_than_are_made_dense_at_a_time(tmp_path: Path) -> None:
    base, dense = quantized("gptq", tmp_path, intermediate_size=2 * PIECE + 32)
    adapter = adapter_for(dense, target_modules=("up_proj",))
    merge(base, adapter, tmp_path / "out", dtype="float32", held_out=0)
    name = "model.layers.0.mlp.up_proj"
    weights, part = load_file(dense / "model.safetensors"), adapter.parts[name]
    expected = weights[f"{name}.weight"] + part.scale * (part.b.t() @ part.a)
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"], expected)


def test_the_command_says_what_it_makes_of_a_quantized_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, dense = quantized("fp8", tmp_path)
    write_adapter(tmp_path / "adapter", adapter_for(in_half(dense)))
    options = ["--output", str(tmp_path / "out"), "--dtype", "bfloat16", "--held-out", "2", "--length", "32", "--json"]
    assert run(["merge", str(base), str(tmp_path / "adapter"), *options]) == 0
    captured = capsys.readouterr()
    assert "The base's weights are fp8; what is written is dense, bfloat16." in captured.err
    assert "Drift: log-probabilities of adapter and merged model differ by" in captured.err
    assert json.loads(captured.out)["dequantized"] == "fp8"
