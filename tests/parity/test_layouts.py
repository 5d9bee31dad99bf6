"""Checkpoints as they lie on disk: published names, bare decoders, shards, `.bin`, and configurations of both generations.

Each folder is a rewriting of one that transformers wrote; the model read from it must compute the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.assemble import assemble
from quire.errors import ModelError
from quire.models.config import read_model_config
from tests.parity.conftest import Pair
from tests.parity.families import SIZES, randomise, save
from tests.parity.paged import packed_logits

FolderOf = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
PairOf = Callable[[str], Pair]
TOKENS = list(range(3, 60))


def logits_of(folder: Path) -> Tensor:
    return packed_logits(assemble(folder, read_model_config(folder), "float32"), [TOKENS])[0]


def write(folder: Path, source: Path, tensors: dict[str, Tensor], *, pickled: bool = False) -> Path:
    """`source`'s configuration with other tensors."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name,prefix", [("gpt2", "transformer."), ("opt-350m", "model."), ("llama-plain", "model.")])
@pytest.mark.parametrize("pickled", [False, True])
def test_files_of_the_bare_decoder(name: str, prefix: str, pickled: bool, folder_of: FolderOf, tmp_path: Path) -> None:
    """openai-community/gpt2 and facebook/opt-350m leave the decoder's own name out."""
    source = folder_of(name)[1]
    tensors = {stored.removeprefix(prefix): tensor for stored, tensor in load_file(source / "model.safetensors").items()}
    assert torch.equal(logits_of(write(tmp_path / "bare", source, tensors, pickled=pickled)), logits_of(source))


def test_buffers_of_old_files_are_no_parameters(folder_of: FolderOf, tmp_path: Path) -> None:
    for name, extra in {
        "gpt2": {"h.0.attn.bias": torch.ones(1, 1, 128, 128), "h.0.attn.masked_bias": torch.tensor(-1e4)},
        "llama-plain": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)},
        "opt": {"decoder.version": torch.tensor([3.0])},
    }.items():
        source = folder_of(name)[1]
        tensors = load_file(source / "model.safetensors") | extra
        assert torch.equal(logits_of(write(tmp_path / name, source, tensors)), logits_of(source))


def test_a_tied_head_may_be_in_the_file(folder_of: FolderOf, tmp_path: Path) -> None:
    """The `.bin` files of OPT hold `lm_head.weight` beside the table that it is."""
    source = folder_of("opt")[1]
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    assert torch.equal(logits_of(write(tmp_path / "tied", source, tensors, pickled=True)), logits_of(source))


@pytest.mark.parametrize("name", ["llama-plain", "mixtral", "gemma2"])
def test_shards(name: str, folder_of: FolderOf, tmp_path: Path) -> None:
    model, source = folder_of(name)
    folder = save(model, tmp_path / name, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(folder), logits_of(source))


@pytest.mark.parametrize(
    "name,expected",
    [
        ("mixtral", ["block_sparse_moe.gate", *(f"block_sparse_moe.experts.4.w{n}" for n in (1, 2, 3))]),
        ("qwen3_moe", ["mlp.gate", *(f"mlp.experts.5.{part}_proj" for part in ("gate", "up", "down"))]),
        ("phi3", ["self_attn.qkv_proj", "mlp.gate_up_proj"]),
        ("gemma2", ["pre_feedforward_layernorm", "post_feedforward_layernorm"]),
        ("qwen3", ["self_attn.q_norm", "self_attn.k_norm"]),
    ],
)
def test_modules_have_the_names_of_published_checkpoints(name: str, expected: list[str], dense_pair_of: PairOf) -> None:
    names = set(dict(dense_pair_of(name)[1].named_parameters()))
    assert {f"model.layers.1.{part}.weight" for part in expected} <= names


@pytest.mark.parametrize("layout", ["published", "in memory"])
def test_the_text_part_of_an_image_and_text_checkpoint(layout: str, tmp_path: Path) -> None:
    text = {**SIZES, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 12, "tie_word_embeddings": True}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.Gemma3Config(
        text_config={**text, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    randomise(model)
    folder = save(model, tmp_path / "model")
    if layout == "in memory":
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        folder = write(tmp_path / "other", folder, tensors)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits_of(folder), expected, atol=5e-5, rtol=0)


def as_before_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `torch_dtype` where transformers 4 had them."""
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype")
    parameters = config.pop("rope_parameters")
    config.pop("layer_types", None)
    if "full_attention" in parameters:
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        parameters = parameters["full_attention"]
    config["rope_theta"] = parameters.pop("rope_theta")
    config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor", 1.0)
    config["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    return config


SCALED = ("llama-linear", "llama-llama3", "llama-yarn", "llama-dynamic", "phi3-partial", "phi3-longrope")
WINDOWED = ("mistral-window", "qwen2-window", "gemma2", "gemma3", "qwen3_moe")


@pytest.mark.parametrize("name", SCALED + WINDOWED)
def test_configurations_of_transformers_4(name: str, folder_of: FolderOf, tmp_path: Path) -> None:
    source = folder_of(name)[1]
    folder = write(tmp_path / "old", source, load_file(source / "model.safetensors"))
    old = as_before_transformers_5(json.loads((source / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(old))
    ours, before = read_model_config(folder), read_model_config(source)
    assert (ours.layer_windows, ours.dtype, ours.norm_eps) == (before.layer_windows, before.dtype, before.norm_eps)
    assert torch.equal(logits_of(folder), logits_of(source))


def test_unknown_and_missing_tensors_are_named(folder_of: FolderOf, tmp_path: Path) -> None:
    source = folder_of("qwen2")[1]
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(12)
    del tensors["model.layers.2.self_attn.k_proj.bias"]
    folder = write(tmp_path / "wrong", source, tensors)
    with pytest.raises(ModelError, match=r"missing: model.layers.2.self_attn.k_proj.bias; unknown: .*q_norm.weight"):
        logits_of(folder)
