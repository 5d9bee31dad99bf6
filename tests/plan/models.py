"""Model shapes and machines for the planner's tests; no weights anywhere."""

from __future__ import annotations

from typing import Any

from quire.models.config import ModelConfig, parse_model_config
from quire.plan.hardware import Hardware

GIB = 1 << 30


def shape(**changes: Any) -> ModelConfig:
    """A Llama of about half a billion parameters; `changes` in config.json's names."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
    }
    return parse_model_config({**raw, **changes})


def machine(free: int, cores: int = 4) -> Hardware:
    return Hardware(cores=cores, memory_total=max(free, 16 * GIB), memory_free=free, isa=("avx2",))
