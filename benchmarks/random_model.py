"""A checkpoint folder of random weights in the shape of Qwen2.5-0.5B: speed does not depend on what a model has learned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quire.models.config import parse_model_config
from quire.models.registry import build_model

TOKENIZER_SIZE = 300


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are Qwen2.5-0.5B's."""

    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    vocabulary: int = 151_936

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
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


def write(folder: Path, shape: Shape) -> None:
    """The folder: config, one safetensors file in bfloat16, and a small byte-level tokenizer that Quire wants to see."""
    (folder / "config.json").write_text(json.dumps(shape.config()))
    with torch.device("meta"):
        tree = build_model(parse_model_config(shape.config()))
    torch.manual_seed(0)
    weights = {}
    for name, parameter in tree.named_parameters():
        if name == "lm_head.weight":
            continue  # tied
        if parameter.dim() == 1:
            filled = torch.ones(parameter.shape) if name.endswith("norm.weight") else torch.zeros(parameter.shape)
        else:
            filled = torch.empty(parameter.shape).normal_(std=0.02)
        weights[name] = filled.to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TOKENIZER_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
