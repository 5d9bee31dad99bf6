"""What is read from published config.json files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.errors import ModelError
from quire.models.config import ModelConfig, parse_model_config, read_model_config
from quire.models.registry import ARCHITECTURES, build_model, model_class
from tests.models.published import PUBLISHED

# name -> (architecture's file, heads, kv heads, head size, inner size, positions, dtype, tied, activation, eps, theta)
EXPECTED: dict[str, tuple[Any, ...]] = {
    "facebook/opt-125m": ("opt", 12, 12, 64, 3072, 2048, "float16", True, "relu", 1e-5, None),
    "facebook/opt-350m": ("opt", 16, 16, 64, 4096, 2048, "float16", True, "relu", 1e-5, None),
    "openai-community/gpt2": ("gpt2", 12, 12, 64, 3072, 1024, "float32", True, "gelu_tanh", 1e-5, None),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 12, 2, 128, 8960, 32768, "bfloat16", True, "silu", 1e-6, 1e6),
    "mistralai/Mistral-7B-v0.1": ("llama", 32, 8, 128, 14336, 32768, "bfloat16", False, "silu", 1e-5, 1e4),
    "meta-llama/Llama-2-7b-hf": ("llama", 32, 32, 128, 11008, 4096, "float16", False, "silu", 1e-5, 1e4),
    "huggyllama/llama-7b": ("llama", 32, 32, 128, 11008, 2048, "float16", False, "silu", 1e-6, 1e4),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 32, 8, 128, 14336, 131072, "bfloat16", False, "silu", 1e-5, 5e5),
    "google/gemma-2-2b": ("gemma2", 8, 4, 256, 9216, 8192, "float32", True, "gelu_tanh", 1e-6, 1e4),
    "google/gemma-3-1b-it": ("gemma3", 4, 1, 256, 6912, 32768, "bfloat16", True, "gelu_tanh", 1e-6, 1e6),
    "google/gemma-3-4b-it": ("gemma3", 8, 4, 256, 10240, 131072, "bfloat16", True, "gelu_tanh", 1e-6, 1e6),
    "microsoft/Phi-3-mini-4k-instruct": ("phi3", 32, 32, 96, 8192, 4096, "bfloat16", False, "silu", 1e-5, 1e4),
    "microsoft/Phi-3-mini-128k-instruct": ("phi3", 32, 32, 96, 8192, 131072, "bfloat16", False, "silu", 1e-5, 1e4),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", 32, 8, 128, 14336, 32768, "bfloat16", False, "silu", 1e-5, 1e6),
    "Qwen/Qwen3-0.6B": ("qwen3", 16, 8, 128, 3072, 40960, "bfloat16", True, "silu", 1e-6, 1e6),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", 32, 4, 128, 6144, 40960, "bfloat16", False, "silu", 1e-6, 1e6),
}
# Parameters of the whole model, as the models' cards round them.
BILLIONS = {
    "facebook/opt-125m": 0.125, "facebook/opt-350m": 0.331, "openai-community/gpt2": 0.124,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54, "mistralai/Mistral-7B-v0.1": 7.24, "meta-llama/Llama-2-7b-hf": 6.74,
    "huggyllama/llama-7b": 6.74, "meta-llama/Llama-3.1-8B-Instruct": 8.03, "google/gemma-2-2b": 2.61,
    "google/gemma-3-1b-it": 1.0, "google/gemma-3-4b-it": 3.88, "microsoft/Phi-3-mini-4k-instruct": 3.82,
    "microsoft/Phi-3-mini-128k-instruct": 3.82, "mistralai/Mixtral-8x7B-v0.1": 46.7, "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-30B-A3B": 30.5,
}  # fmt: skip


def parsed(name: str, **changes: Any) -> ModelConfig:
    return parse_model_config({**PUBLISHED[name], **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str) -> None:
    config = parsed(name)
    main = config.layer_ropes[-1] if "gemma-3" not in name else config.layer_ropes[5]
    assert (
        ARCHITECTURES[config.architecture], config.num_heads, config.num_kv_heads, config.head_dim,
        config.intermediate_size, config.max_position_embeddings, config.dtype, config.tie_word_embeddings,
        config.activation, config.norm_eps, main and main.theta,
    ) == EXPECTED[name]  # fmt: skip
    assert len(config.layer_windows) == len(config.layer_ropes) == config.num_layers


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tree_has_as_many_parameters_as_the_model(name: str) -> None:
    """Built on the meta device: a wrong size, a forgotten projection or an untied head would show."""
    with torch.device("meta"):
        model = build_model(parsed(name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(BILLIONS[name], rel=0.006)


def test_windows() -> None:
    assert set(parsed("mistralai/Mistral-7B-v0.1").layer_windows) == {4096}
    for name in ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B", "mistralai/Mixtral-8x7B-v0.1"):
        assert set(parsed(name).layer_windows) == {None}
    turned_on = parsed("Qwen/Qwen2.5-1.5B-Instruct", use_sliding_window=True)
    assert turned_on.layer_windows == (None,) * 21 + (32768,) * 7
    assert parsed("google/gemma-2-2b").layer_windows == (4096, None) * 13
    assert parsed("google/gemma-3-1b-it").layer_windows == ((512,) * 5 + (None,)) * 4 + (512,) * 2
    assert parsed("google/gemma-3-4b-it").layer_windows[:7] == (1024,) * 5 + (None, 1024)
    assert set(parsed("microsoft/Phi-3-mini-4k-instruct").layer_windows) == {2047}


def test_rotations() -> None:
    llama = parsed("meta-llama/Llama-3.1-8B-Instruct").layer_ropes[0]
    assert (llama.kind, llama.options["factor"], llama.options["original_max_position_embeddings"]) == ("llama3", 8.0, 8192)
    local, main = (parsed("google/gemma-3-4b-it").layer_ropes[n] for n in (4, 5))
    assert (local.kind, local.theta, main.kind, main.theta) == ("default", 1e4, "linear", 1e6)
    phi = parsed("microsoft/Phi-3-mini-128k-instruct").layer_ropes[0]
    assert (phi.kind, phi.options["original_max_position_embeddings"], phi.rotary_dim) == ("longrope", 4096, 96)
    scaling = {**PUBLISHED["microsoft/Phi-3-mini-128k-instruct"]["rope_scaling"], "type": "su"}
    assert parsed("microsoft/Phi-3-mini-128k-instruct", rope_scaling=scaling).layer_ropes[31].kind == "longrope"


def test_end_tokens_and_types() -> None:
    assert parsed("google/gemma-3-1b-it").eos_token_ids == (1, 106)
    assert parsed("google/gemma-3-4b-it").eos_token_ids == (1, 106)
    assert parsed("facebook/opt-125m").eos_token_ids == (2,)
    assert parsed("facebook/opt-125m", eos_token_id=None).eos_token_ids == ()
    assert parsed("facebook/opt-125m", torch_dtype=None, dtype="bfloat16").dtype == "bfloat16"
    assert parsed("facebook/opt-125m", torch_dtype=None).dtype == "float32"
    assert parsed("mistralai/Mistral-7B-v0.1", head_dim=None, num_key_value_heads=None).num_kv_heads == 32


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"architectures": []}, "architecture"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_act": "swiglu"}, "'swiglu' is not supported; one of silu"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "'spiral' is not supported; one of default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs the field 'factor'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "must have 64 numbers, got 1"),
        ({"layer_types": ["full_attention"]}, "all 32 layers, got 1"),
        ({"num_attention_heads": 0}, "not usable"),
        ({"vocab_size": "many"}, "not usable"),
    ],
)
def test_a_wrong_file_is_refused_with_its_reason(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED["mistralai/Mistral-7B-v0.1"], **changes}))
    with pytest.raises(ModelError, match=message):
        read_model_config(tmp_path)


def test_an_unknown_architecture_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ModelError, match=r"'Qwen3ForCausualLM' is not supported. Did you mean \"Qwen3ForCausalLM\""):
        model_class(parsed("Qwen/Qwen3-0.6B", architectures=["Qwen3ForCausualLM"]))
