"""Whether Quire, PEFT and vLLM would take an adapter folder, and why not.

Quire's answer comes from its own reader. What is said of the others are their rules, as PEFT 0.21 and vLLM 0.32 have them,
applied to the files; neither is installed or run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quire.errors import AdapterError, ModelError
from quire.lora.adapter import CONFIG, PICKLE, TEMPLATE, TENSORS, read_adapter, read_config, read_tensors
from quire.lora.config import CHANGED_BASES, REFUSED
from quire.lora.keys import ENDINGS, PREFIX
from quire.models.config import ModelConfig
from quire.models.registry import build_model
from quire.weights.files import tensor_headers

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
VLLM_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight")
DENSE_MLP = re.compile(r"\.mlp\.(gate|up|down)_proj\.lora_")
VLLM_SAVED = {"classifier", "score"}


@dataclass(frozen=True)
class Verdict:
    """Of one reader. reasons: why not; notes: what to know where it does take it."""

    reader: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def accepts(self) -> bool:
        return not self.reasons


def check_adapter(folder: Path, base: ModelConfig | None = None) -> list[Verdict]:
    """The verdicts on `folder`: by its files alone, or also against a base of this configuration (no weights are read)."""
    quire = _quire(folder, base)
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        shapes = _shapes(folder)
    except (OSError, ValueError, RecursionError, AdapterError, ModelError) as error:
        reason = f"{CONFIG} or {TENSORS} cannot be read: {error}"
        return [quire, Verdict("PEFT", (reason,)), Verdict("vLLM", (reason,))]
    if not isinstance(raw, dict):
        reason = f"{CONFIG} is not a JSON object."
        return [quire, Verdict("PEFT", (reason,)), Verdict("vLLM", (reason,))]
    return [quire, _peft(raw, shapes, quire), _vllm(raw, shapes, folder)]


def _quire(folder: Path, base: ModelConfig | None) -> Verdict:
    pickled = not (folder / TENSORS).is_file() and (folder / PICKLE).is_file()
    notes = [f"{PICKLE} is a pickle file: read only from the command line, with leave."] if pickled else []
    try:
        if base is None:
            read_config(folder)
            for key, tensor in read_tensors(folder, allow_pickle=True).items():
                _check_alone(key, tensor)
            notes.append("not compared with a base model: give --model.")
        else:
            with torch.device("meta"):
                model = build_model(base)
            adapter = read_adapter(folder, model, allow_pickle=True)
            notes.append(f"rank {adapter.rank}, {len(adapter.parts)} modules, digest {adapter.digest[:16]}.")
    except AdapterError as error:
        return Verdict("Quire", (str(error),), tuple(notes))
    return Verdict("Quire", (), tuple(notes))


def _check_alone(key: str, tensor: torch.Tensor) -> None:
    if not key.startswith(PREFIX) or not key.endswith(tuple(ENDINGS)):
        raise AdapterError(f"tensor {key!r} is not one of LoRA's.")
    if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
        raise AdapterError(f"tensor {key!r} has numbers that are not finite floating point numbers.")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    if (folder / TENSORS).is_file():
        return {key: header.shape for key, header in tensor_headers(folder / TENSORS).items()}
    return {key: tuple(tensor.shape) for key, tensor in read_tensors(folder, allow_pickle=True).items()}


def _peft(raw: Mapping[str, Any], shapes: Mapping[str, Any], quire: Verdict) -> Verdict:
    reasons, notes = [], []
    if raw.get("peft_type") is None:
        reasons.append("peft_type is missing.")
    if raw.get("layers_pattern") and raw.get("layers_to_transform") is None:
        reasons.append("layers_pattern needs layers_to_transform.")
    if isinstance(raw.get("target_modules"), str) and (raw.get("layers_to_transform") is not None or raw.get("layers_pattern")):
        reasons.append("layers_to_transform and layers_pattern do not go with a target_modules that is one text.")
    if raw.get("lora_bias") and raw.get("use_dora"):
        reasons.append("lora_bias does not go with use_dora.")
    if _changed_base(raw):
        notes.append(f"init_lora_weights is {raw['init_lora_weights']!r}: right only on the base that this start changed.")
    experts = any(".experts." in key for key in shapes)
    if experts and raw.get("lora_dropout"):
        reasons.append("lora_dropout must be 0 for experts, which transformers 5 keeps as parameters.")
    if experts and raw.get("use_rslora") and not raw.get("target_parameters"):
        notes.append("joining an expert's gate and up matrices, PEFT makes their scale larger by sqrt(2) with use_rslora.")
    if experts and any(DENSE_MLP.search(key) for key in shapes):
        notes.append("beside experts it passes over A and B of other layers' gate_proj, up_proj and down_proj.")
    if quire.reasons and not reasons:
        notes.append("it passes over tensors that are missing or unknown with a warning, and the rest may be wrong.")
    return Verdict("PEFT", tuple(reasons), tuple(notes))


def _changed_base(raw: Mapping[str, Any]) -> bool:
    start = raw.get("init_lora_weights")
    return isinstance(start, str) and start.lower().startswith(CHANGED_BASES)


def _vllm(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> Verdict:
    reasons = [f"{name} is missing." for name in ("r", "lora_alpha", "target_modules") if name not in raw]
    ranks = [raw.get("r"), *(raw.get("rank_pattern") or {}).values()]
    rank = max((one for one in ranks if type(one) is int), default=0)
    if rank > VLLM_RANKS[-1]:
        reasons.append(f"rank {rank} is above {VLLM_RANKS[-1]}, the largest --max-lora-rank.")
    if raw.get("use_dora"):
        reasons.append("DoRA is not supported (use_dora).")
    if not set(raw.get("modules_to_save") or ()) <= VLLM_SAVED:
        reasons.append(f"modules_to_save is {raw['modules_to_save']}; only {sorted(VLLM_SAVED)} are supported.")
    if raw.get("bias", "none") != "none":
        reasons.append(f"bias is {raw['bias']!r}; adapters' biases are not supported.")
    if raw.get("lora_bias"):
        reasons.append("lora_bias is not supported.")
    if _changed_base(raw):
        reasons.append(f"init_lora_weights is {raw['init_lora_weights']!r}; only converted adapters are supported.")
    reasons += [f"{name} is not supported." for name in REFUSED if raw.get(name)]
    if raw.get("trainable_token_indices"):
        reasons.append("trainable_token_indices: trainable_tokens_delta is not supported.")
    strange = _first(key for key in shapes if not key.endswith(VLLM_ENDINGS))
    if strange is not None and not reasons:
        reasons.append(f"tensor {strange!r} is not supported.")
    notes = []
    if not reasons and rank > VLLM_DEFAULT_RANK:
        notes.append(f"needs --max-lora-rank {next(size for size in VLLM_RANKS if size >= rank)}.")
    if any(".lora_embedding_" in key for key in shapes):
        notes.append("A and B of the embedding: only for models whose class lists embedding_modules.")
    if (folder / TEMPLATE).is_file():
        notes.append("the folder's chat template is not used; give it with --chat-template.")
    notes.append("A and B are rounded to the base's type.")
    return Verdict("vLLM", tuple(reasons), () if reasons else tuple(notes))


def _first(keys: Iterable[str]) -> str | None:
    return next(iter(keys), None)
