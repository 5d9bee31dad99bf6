"""Checkpoint folders of random weights in the shapes of known models: speed does not depend on what a model has learned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import random_tokenizer
from quire.models.config import parse_model_config
from quire.models.registry import build_model

SPREAD = 0.02
ADAPTER_RANK, ADAPTER_TARGETS = 16, ("q_proj", "v_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are Qwen2.5-0.5B's. end: the id of the token that would end a text."""

    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    vocabulary: int = 151_936
    family: str = "qwen2"
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    end: int = 151_645

    def config(self) -> dict[str, object]:
        """config.json, with the base of the rotation where older and newer readers look for it."""
        return {
            "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[self.family]],
            "model_type": self.family,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": self.end - 2,
            "eos_token_id": self.end,
            "torch_dtype": "bfloat16",
            "dtype": "bfloat16",
        }

    @property
    def matrices(self) -> tuple[tuple[str, int, int], ...]:
        """(name, outputs, inputs) of a layer's products, those that read the same input laid together, and the head's."""
        kv = self.hidden // self.heads * self.kv_heads
        return (
            ("qkv", self.hidden + 2 * kv, self.hidden),
            ("o", self.hidden, self.hidden),
            ("gate_up", 2 * self.intermediate, self.hidden),
            ("down", self.hidden, self.intermediate),
            ("head", self.vocabulary, self.hidden),
        )

    @property
    def linears(self) -> dict[str, tuple[str, int, int]]:
        """(where it is, outputs, inputs) of each linear of a layer by its name in checkpoints."""
        wide, kv, inner = self.hidden, self.hidden // self.heads * self.kv_heads, self.intermediate
        return {
            **{name: ("self_attn", wide if name in ("q_proj", "o_proj") else kv, wide) for name in _ATTENTION},
            **{name: ("mlp", inner, wide) for name in ("gate_proj", "up_proj")},
            "down_proj": ("mlp", wide, inner),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices."""
        kv = self.hidden // self.heads * self.kv_heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in bfloat16."""
        return 4 * self.layers * self.hidden // self.heads * self.kv_heads

    def work(self, rows: int, draws: int, attended: int) -> float:
        """Floating point operations for `rows` tokens of which `draws` need logits; `attended`: pairs of tokens."""
        return 2 * (rows * self.layer_weights + draws * self.head_weights) + 4 * attended * self.layers * self.hidden


# Qwen2.5-0.5B, Llama 3.2 1B and SmolLM2-135M.
SHAPES = {
    "0.5b": Shape(),
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 128_256, "llama", 500_000.0, 1e-5, 128_255),
    "0.1b": Shape(576, 30, 9, 3, 1536, 49_152, "llama", 100_000.0, 1e-5, 49_151),
}


def write(folder: Path, shape: Shape, *, full_tokenizer: bool = False) -> None:
    """The folder: config, one safetensors file in bfloat16, and a byte-level tokenizer.

    full_tokenizer: one that covers the vocabulary, which other engines insist on; else a small one that is made at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    with torch.device("meta"):
        tree = build_model(parse_model_config(shape.config()))
    torch.manual_seed(0)
    weights = {}
    for name, parameter in tree.named_parameters():
        if name == "lm_head.weight":
            continue  # tied
        # Biases get the same spread as weights: with zeros, an engine that drops them would not be found out.
        is_norm = parameter.dim() == 1 and name.endswith("norm.weight")
        filled = torch.ones(parameter.shape) if is_norm else torch.empty(parameter.shape).normal_(std=SPREAD)
        weights[name] = filled.to(torch.bfloat16)
    if full_tokenizer:
        random_tokenizer.write_full(folder, shape.vocabulary, shape.end)
    else:
        random_tokenizer.write_small(folder)
    # Last, so that a folder with weights is complete.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path, shape: Shape, seed: int, targets: tuple[str, ...] = ADAPTER_TARGETS) -> None:
    """A LoRA adapter in PEFT's layout."""
    draw = torch.Generator().manual_seed(seed)
    sizes = shape.linears

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw) * SPREAD).to(torch.bfloat16)

    weights = {}
    for layer in range(shape.layers):
        for target in targets:
            place, outputs, inputs = sizes[target]
            name = f"base_model.model.model.layers.{layer}.{place}.{target}"
            weights[f"{name}.lora_A.weight"] = matrix(ADAPTER_RANK, inputs)
            weights[f"{name}.lora_B.weight"] = matrix(outputs, ADAPTER_RANK)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": ADAPTER_RANK,
        "lora_alpha": 2 * ADAPTER_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "base_model_name_or_path": "random",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "adapter_model.safetensors")
