"""The random model and its copies: what engines are given is what it claims to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import random_model
from benchmarks.engines import compressed
from benchmarks.engines.check import check
from benchmarks.engines.checkpoints import CannotMake, Work
from benchmarks.engines.lineup import Entry
from benchmarks.random_model import Shape
from quire.text.tokenizer import Tokenizer
from tests.benchmarks.test_sitting import ROOM, Here, Tiny

SMALL = Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, vocabulary=31_000, end=30_990)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "bf16"
    random_model.write(folder, SMALL, full_tokenizer=True)
    return folder


def test_the_tokenizer_covers_the_vocabulary(model: Path) -> None:
    facts = json.loads((model / "tokenizer.json").read_text())
    assert len(facts["model"]["vocab"]) + len(facts["added_tokens"]) == 31_000
    names = {token["content"]: token["id"] for token in facts["added_tokens"]}
    assert names["<|im_end|>"] == SMALL.end == json.loads((model / "config.json").read_text())["eos_token_id"]
    tokenizer = Tokenizer.from_folder(model)
    assert (len(tokenizer), tokenizer.eos_token_id) == (31_000, SMALL.end)
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"


def test_weights_and_biases_are_random_and_norms_are_one(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    matrices = sum(values.numel() for values in weights.values() if values.dim() == 2)
    assert matrices == SMALL.layer_weights + SMALL.head_weights
    assert all(values.dtype == torch.bfloat16 for values in weights.values())
    for name, values in weights.items():
        if name.endswith("norm.weight"):
            assert bool((values == 1).all())
        else:
            assert 0.01 < float(values.float().std()) < 0.03, name


@pytest.mark.parametrize("kind, worst", [("w8a8", 0.5), ("w4a16", 0.5)])
def test_compressed_copies_are_within_half_a_step(model: Path, tmp_path: Path, kind: str, worst: float) -> None:
    compressed.write(model, tmp_path, kind)
    source, copy = load_file(model / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == (8 if kind == "w8a8" else 4)
    assert torch.equal(copy["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    name = "model.layers.1.mlp.down_proj.weight"
    wanted, scale = source[name].float(), copy[f"{name}_scale"].float()
    if kind == "w8a8":
        found, step = copy[name].float() * scale, scale.expand_as(wanted)
    else:
        assert copy[f"{name}_shape"].tolist() == list(wanted.shape)
        words = copy[f"{name}_packed"].to(torch.int64) & 0xFFFFFFFF
        numbers = torch.stack([(words >> (4 * place)) & 15 for place in range(8)], -1).flatten(1) - 8
        step = scale.repeat_interleave(config["config_groups"]["group_0"]["weights"]["group_size"], 1)
        found = numbers * step
    # The scale itself is kept in bfloat16.
    assert float(((found - wanted).abs() / step).max()) < worst + 127 / 256


def test_adapters_are_pefts(tmp_path: Path) -> None:
    random_model.write_adapter(tmp_path, SMALL, 3)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * SMALL.layers
    assert tuple(weights["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"].shape) == (32, 16)


def test_without_peers_only_ours_can_be_made(tmp_path: Path) -> None:
    work = Work(tmp_path, "0.1b", None)
    work.path("bf16").mkdir()
    work.make("bf16")  # it is there
    for form in ("gguf-bf16", "ov-int8"):
        with pytest.raises(CannotMake, match="--peers"):
            work.make(form)


def test_check_names_who_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entered = [
        Entry("vllm-bf16", "16-bit", "vllm", "vllm", "bf16", ("W1",)),
        Entry("broken", "16-bit", None, "broken", "bf16", ("W1",)),
        Entry("strange", "16-bit", None, "strange", "bf16", ("W1",)),
    ]
    assert not check(Here(Tiny(tmp_path), None, 1, ROOM), entered, tmp_path)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert "not installed" in lines[0]
    assert "FAILS: the process has ended: it does not start" in lines[1]
    assert "tokens [1, 1, 1" in lines[2]
