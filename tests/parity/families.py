"""One table of tiny random models: each family and each variant of it that computes something else.

Every folder is written by transformers' own `save_pretrained` and read by Quire's loader, so that names, layouts and
configurations are compared along with the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GPT2_SIZES: dict[str, Any] = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}
OPT_SIZES: dict[str, Any] = {
    name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
} | {"ffn_dim": 80, "max_position_embeddings": 128, "word_embed_proj_dim": 48, "pad_token_id": 1}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG_FACTORS = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 12, "tie_word_embeddings": True}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Variant:
    """A configuration class of transformers and what differs from SIZES.

    trained: the length past which transformers rotates all positions anew (dynamic, longrope).
    """

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)
    trained: int | None = None

    def config(self) -> transformers.PreTrainedConfig:
        return getattr(transformers, f"{self.family}Config")(**{**self.sizes, **self.options})


def _llama(name: str, trained: int | None = None, **options: Any) -> Variant:
    return Variant(f"llama-{name}", "Llama", options, trained=trained)


VARIANTS = (
    _llama("plain"),
    _llama("tied-heads", tie_word_embeddings=True, num_key_value_heads=4, head_dim=20),
    _llama("biases", attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    _llama("linear", rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}),
    _llama("llama3", rope_parameters={**LLAMA3_ROPE, "original_max_position_embeddings": 32, "rope_theta": 500.0}),
    _llama("yarn", rope_parameters={**YARN_ROPE, "rope_theta": 10000.0}),
    _llama("yarn-mscale", rope_parameters={**YARN_ROPE, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}),
    _llama(
        "dynamic", trained=96, max_position_embeddings=96, rope_parameters={"rope_type": "dynamic", "factor": 2.0}
    ),
    Variant("mistral-window", "Mistral", {"sliding_window": 10}),
    Variant("mistral-full", "Mistral", {"sliding_window": None, "head_dim": 8}),
    Variant("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    Variant("qwen2-window", "Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    Variant("qwen3", "Qwen3", {"head_dim": 20}),
    Variant("opt", "OPT", sizes=OPT_SIZES),
    Variant("opt-350m", "OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}, sizes=OPT_SIZES),
    Variant("opt-bare", "OPT", {"enable_bias": False, "layer_norm_elementwise_affine": False}, sizes=OPT_SIZES),
    Variant("gpt2", "GPT2", sizes=GPT2_SIZES),
    Variant("gpt2-scales", "GPT2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 72}, sizes=GPT2_SIZES),
    Variant("gemma2", "Gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}),
    Variant("gemma3", "Gemma3Text", {**GEMMA, "num_hidden_layers": 7}),
    Variant(
        "gemma3-linear",
        "Gemma3Text",
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
    ),
    Variant("phi3", "Phi3", {"sliding_window": 11}),
    Variant("phi3-partial", "Phi3", {"partial_rotary_factor": 0.5}),
    Variant(
        "phi3-longrope",
        "Phi3",
        {"original_max_position_embeddings": 96, "rope_scaling": {"type": "longrope", **LONG_FACTORS}},
        trained=96,
    ),
    Variant("mixtral", "Mixtral", EXPERTS),
    Variant("mixtral-window", "Mixtral", {**EXPERTS, "num_experts_per_tok": 1, "sliding_window": 8}),
    Variant(
        "qwen3_moe",
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 16},
    ),
    Variant(
        "qwen3_moe-mixed",
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "num_hidden_layers": 4}
        | {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}


def reference_model(variant: Variant, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' model with weights that let mistakes show: no norm weight is 1, no bias 0, no logit tiny."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(variant.config(), attn_implementation="eager").eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Matrices that keep the size of what they multiply; norm weights and biases spread around where they start."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        elif id(parameter) in tables:
            parameter.normal_(std=0.3)
        else:
            parameter.normal_(std=1.3 * parameter.shape[-1] ** -0.5)


def save(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> Path:
    """The folder that transformers writes. Its generation defaults are another room's."""
    model.save_pretrained(folder, **options)
    return folder
