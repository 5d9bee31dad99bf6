"""Every kind of adapter that PEFT makes and Quire reads: one line each, with PEFT's own arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from quire.batch import Batch, packed
from quire.lora.adapter import Adapter
from quire.lora.slots import Slots
from quire.models.decoder import CausalLM

SEQUENCES = [[5, 9, 33, 7, 60, 12, 8], [71, 3, 3, 44, 20], [15, 16, 17, 18, 19, 90, 91, 92, 5]]


@dataclass(frozen=True)
class Case:
    """An adapter of PEFT on a variant of the parity table."""

    name: str
    base: str
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> peft.LoraConfig:
        return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **self.options})


def _case(name: str, base: str = "qwen3", **options: Any) -> Case:
    return Case(name, base, options)


QV = ["q_proj", "v_proj"]
CASES = (
    _case("plain", target_modules=QV),
    _case("all-linear", target_modules="all-linear"),
    _case("llama-biases", "llama-biases", target_modules="all-linear"),
    _case("gpt2", "gpt2", target_modules=["c_attn", "c_proj", "c_fc"]),
    _case("opt", "opt", target_modules="all-linear"),
    _case("phi3", "phi3", target_modules="all-linear"),
    _case("gemma3", "gemma3", target_modules="all-linear"),
    _case("rslora", target_modules=QV, use_rslora=True),
    _case("gaussian", target_modules=QV, init_lora_weights="gaussian"),
    _case(
        "patterns",
        target_modules="all-linear",
        rank_pattern={r"layers\.0\..*q_proj": 2, "down_proj": 7},
        alpha_pattern={"q_proj": 3, r"layers\.[12]\.mlp\.up_proj": 9.5},
    ),
    _case("layers", target_modules=QV, layers_to_transform=[0, 2]),
    _case("layers-pattern", target_modules=["k_proj"], layers_to_transform=1, layers_pattern="layers"),
    _case("regex", target_modules=r".*layers\.[01]\..*(up|down)_proj"),
    _case("exclude", target_modules="all-linear", exclude_modules=["layers.1.mlp.gate_proj", "o_proj"]),
    _case("bias-lora", "llama-biases", target_modules=QV, bias="lora_only"),
    _case("bias-all", "llama-biases", target_modules=QV, bias="all"),
    _case("bias-gpt2", "gpt2", target_modules=["c_attn"], bias="lora_only"),
    _case("bias-all-gpt2", "gpt2", target_modules=["c_attn"], bias="all"),
    _case("bias-all-opt", "opt", target_modules=QV, bias="all"),
    _case("bias-all-opt-350m", "opt-350m", target_modules=QV, bias="all"),
    _case("bias-all-saved", "llama-biases", target_modules=QV, bias="all", modules_to_save=["down_proj"]),
    _case("lora-bias", "llama-biases", target_modules=QV, lora_bias=True),
    _case("dora", target_modules="all-linear", use_dora=True),
    _case("dora-biases", "llama-biases", target_modules="all-linear", use_dora=True),
    _case("dora-gpt2", "gpt2", target_modules=["c_attn", "c_fc"], use_dora=True),
    _case("dora-embedding", target_modules=["q_proj", "embed_tokens"], use_dora=True),
    _case("saved-head", target_modules=QV, modules_to_save=["lm_head"]),
    _case("saved-both", target_modules=QV, modules_to_save=["lm_head", "embed_tokens"]),
    _case("saved-linear", "llama-biases", target_modules=QV, modules_to_save=["down_proj"]),
    _case("saved-gpt2", "gpt2", target_modules=["c_attn"], modules_to_save=["c_fc"]),
    _case("saved-norms", target_modules=QV, modules_to_save=["norm"]),
    _case("saved-norms-layers", target_modules=QV, modules_to_save=["post_attention_layernorm", "k_norm"]),
    _case("saved-norms-gpt2", "gpt2", target_modules=["c_attn"], modules_to_save=["ln_2", "ln_f"]),
    _case("saved-norms-opt", "opt-350m", target_modules=QV, modules_to_save=["layer_norm"]),
    _case("saved-norms-gemma3", "gemma3", target_modules=QV, modules_to_save=["norm"]),
    _case("saved-norms-mixtral", "mixtral", target_modules=QV, modules_to_save=["input_layernorm"]),
    _case("saved-layer-gpt2", "gpt2", target_modules=["h.0.attn.c_attn"], modules_to_save=["h.1"]),
    _case("saved-container", target_modules=QV, modules_to_save=["mlp"]),
    _case("saved-tied", "qwen2", target_modules=QV, modules_to_save=["embed_tokens"]),
    _case("saved-tied-head", "qwen2", target_modules=QV, modules_to_save=["lm_head"]),
    _case("saved-tied-both", "qwen2", target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    _case("embedding-tied-both", "qwen2", target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    _case("tokens-tied-both", "qwen2", target_modules=QV, trainable_token_indices=[9, 3], ensure_weight_tying=True),
    _case(
        "everything",
        "llama-biases",
        target_modules="all-linear",
        use_dora=True,
        use_rslora=True,
        bias="all",
        rank_pattern={"q_proj": 2},
        modules_to_save=["lm_head"],
        trainable_token_indices=[60, 5],
    ),
    _case("embedding", target_modules=["q_proj", "embed_tokens"]),
    _case("embedding-gemma", "gemma3", target_modules=["q_proj", "embed_tokens"]),
    _case("embedding-tied", "qwen2", target_modules=["embed_tokens"]),
    _case("head", target_modules=["lm_head", "k_proj"]),
    _case("head-tied", "qwen2", target_modules=["lm_head", "k_proj"]),
    _case("tokens", target_modules=QV, trainable_token_indices=[3, 5, 44]),
    _case("tokens-tied", "qwen2", target_modules=QV, trainable_token_indices={"embed_tokens": [3, 5, 44]}),
    _case("tokens-head", target_modules=QV, trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [7, 8, 9]}),
    _case("moe-attention", "qwen3_moe", target_modules=["q_proj", "o_proj"]),
    _case("moe-fused", "qwen3_moe", target_modules=[], target_parameters=["gate_up_proj", "down_proj"]),
    _case("moe-fused-down", "qwen3_moe", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
    _case("moe-old-names", "qwen3_moe", target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]),
    _case("moe-old-names-mixtral", "mixtral", target_modules=["q_proj", "w1", "w2", "w3"]),
    _case("moe-all-linear", "qwen3_moe", target_modules="all-linear"),
    _case("moe-all-linear-mixtral", "mixtral", target_modules="all-linear"),
    _case("moe-router", "qwen3_moe", target_modules=["q_proj"], target_parameters=["gate.weight"]),
)
BY_NAME = {case.name: case for case in CASES}


def made_by_peft(case: Case, base: Path, seed: int = 1) -> peft.PeftModel:
    """PEFT's model with an adapter whose numbers let mistakes show."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = peft.get_peft_model(model, case.config())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def loaded_by_peft(base: Path, folder: Path) -> peft.PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()


def their_logits(model: torch.nn.Module) -> Tensor:
    """Logits of all sequences, end to end."""
    return torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in SEQUENCES])


def batch(slots: list[int]) -> Batch:
    """The sequences, each in its slot."""
    whole = packed(SEQUENCES)
    rows = [slot for slot, tokens in zip(slots, SEQUENCES, strict=True) for _ in tokens]
    return Batch(whole.tokens, whole.positions, whole.starts, whole.lengths, adapters=torch.tensor(rows, dtype=torch.int32))


def our_logits(model: CausalLM, adapter: Adapter) -> Tensor:
    """Logits of all sequences through one adapter; the model is as it was afterwards."""
    slots = Slots(model)
    slot = slots.take()
    slots.place(slot, adapter)
    try:
        rows = batch([slot] * len(SEQUENCES))
        return model.logits(model(rows), rows.adapters)
    finally:
        slots.give_back(slot)
