"""Which file holds which architecture. Knows no torch until a model is built."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from quire.errors import ModelError, did_you_mean
from quire.models.config import ModelConfig

if TYPE_CHECKING:
    from quire.models.decoder import CausalLM

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GPT2LMHeadModel": "gpt2",
    "OPTForCausalLM": "opt",
}


def model_class(config: ModelConfig) -> type[CausalLM]:
    """The class of the architecture. Raises ModelError that lists what is known."""
    name = config.architecture
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"architecture {name!r} is not supported.{did_you_mean(name, ARCHITECTURES)} Supported: {known}.")
    return importlib.import_module(f"quire.models.{ARCHITECTURES[name]}").Model


def build_model(config: ModelConfig) -> CausalLM:
    """The module tree with fresh (random) float32 parameters; loading and dtype are passes of `assemble`."""
    return model_class(config)(config)
