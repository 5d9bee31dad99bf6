"""A checkpoint's config.json, read into one frozen shape for all families. Knows no torch and reads no weights.

Differences between families that are *data* (names of fields, defaults, which layers have a window) live here; those that
are *mathematics* live in the family's own file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quire.errors import ModelError
from quire.layers.rope_config import RopeConfig

MOST_CONFIG_BYTES = 4 << 20
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
DTYPES = {"float32": "float32", "float": "float32", "float16": "float16", "half": "float16", "bfloat16": "bfloat16"}


@dataclass(frozen=True)
class ModelConfig:
    """What every other room may know of a model. Sizes in elements, lengths in tokens.

    layer_windows: attention window of each layer, None for all that came before. layer_ropes: rotation of each layer, None
    for none. `raw` is the file itself, for the family's own oddities.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    dtype: str
    tie_word_embeddings: bool
    activation: str
    norm_eps: float
    layer_windows: tuple[int | None, ...]
    layer_ropes: tuple[RopeConfig | None, ...]
    num_experts: int = 0
    num_experts_per_token: int = 0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def for_length(self, length: int) -> ModelConfig:
        """The same model for sequences of up to `length` tokens: LongRoPE has other factors for long ones."""
        ropes = tuple(
            replace(rope, options={**rope.options, "served_length": length}) if rope and rope.kind == "longrope" else rope
            for rope in self.layer_ropes
        )
        return replace(self, layer_ropes=ropes)


def read_model_config(folder: Path) -> ModelConfig:
    """The configuration of the checkpoint in `folder`. Raises ModelError that names the file and the field."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    try:
        return parse_model_config(raw)
    except KeyError as missing:
        raise ModelError(f"{path.name} of {folder.name!r} has no field {missing}.") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{path.name} of {folder.name!r} is not usable: {error}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises ModelError."""
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise ModelError(f"{path.name} is larger than {MOST_CONFIG_BYTES} bytes.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no {path.name} in {str(path.parent)!r}: not a model folder in Hugging Face layout.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path.name} in {str(path.parent)!r} is not valid JSON: {error}.") from None
    except OSError as error:
        raise ModelError(f"cannot read {path.name} in {str(path.parent)!r}: {error.strerror}.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} in {str(path.parent)!r} must be a JSON object.")
    return value


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The same from a parsed config.json."""
    architectures = raw.get("architectures") or []
    if not architectures:
        raise ModelError("config.json names no architecture (field 'architectures').")
    text = {**raw, **raw["text_config"]} if isinstance(raw.get("text_config"), Mapping) else dict(raw)
    model_type = str(text.get("model_type", ""))
    text = {**_DEFAULTS.get(model_type, {}), **text}
    fields = _FIELD_NAMES.get(model_type, {})

    def get(name: str, default: Any = ...) -> Any:
        value = text.get(fields.get(name, name))
        if value is None:
            if default is ...:
                raise KeyError(fields.get(name, name))
            return default
        return value

    hidden, heads, layers = int(get("hidden_size")), int(get("num_attention_heads")), int(get("num_hidden_layers"))
    head_dim = int(get("head_dim", hidden // heads))
    kind = str(get("hidden_act", "silu"))
    if kind not in ACTIVATIONS:
        raise ModelError(f"hidden_act {kind!r} is not supported; one of {', '.join(ACTIVATIONS)} is.")
    eos = text.get("eos_token_id")
    windows = _layer_windows(text, layers)
    return ModelConfig(
        architecture=str(architectures[0]),
        model_type=model_type,
        vocab_size=int(get("vocab_size")),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(get("num_key_value_heads", heads)),
        head_dim=head_dim,
        intermediate_size=int(get("intermediate_size", 4 * hidden)),
        max_position_embeddings=int(get("max_position_embeddings")),
        dtype=DTYPES.get(str(text.get("torch_dtype") or text.get("dtype") or "float32"), "float32"),
        tie_word_embeddings=bool(get("tie_word_embeddings", False)),
        activation=ACTIVATIONS[kind],
        norm_eps=float(get("rms_norm_eps", 1e-6)),
        layer_windows=windows,
        layer_ropes=_layer_ropes(text, head_dim, layers),
        num_experts=int(text.get("num_local_experts") or text.get("num_experts") or 0),
        num_experts_per_token=int(text.get("num_experts_per_tok") or 0),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        bos_token_id=text.get("bos_token_id"),
        raw=text,
    )


_FIELD_NAMES: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    "opt": {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
    "gemma2": {"hidden_act": "hidden_activation"},
    "gemma3_text": {"hidden_act": "hidden_activation"},
}
# What a file leaves out where it agrees with the family's own configuration class in transformers, and where that class
# differs from the common defaults above. In the family's spelling.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "opt": {"activation_function": "relu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "qwen3_moe": {"use_sliding_window": False, "sliding_window": 4096},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    "gemma2": {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    # Image-and-text files (gemma-3-4b-it) leave out nearly everything of the text part.
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
}
_WITHOUT_ROPE = ("gpt2", "opt")


def _layer_kinds(text: Mapping[str, Any], layers: int) -> list[str]:
    """"full_attention" or "sliding_attention" for each layer: as the file says, or as the family's class would."""
    kinds = text.get("layer_types")
    if kinds is None:
        model_type = text.get("model_type")
        if model_type in ("qwen2", "qwen3"):
            sliding = [n >= int(text["max_window_layers"]) for n in range(layers)]
        elif model_type in ("gemma2", "gemma3_text"):
            pattern = int(text.get("sliding_window_pattern") or 2)
            sliding = [(n + 1) % pattern != 0 for n in range(layers)]
        else:
            sliding = [text.get("sliding_window") is not None] * layers
        kinds = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    if len(kinds) != layers:
        raise ModelError(f"layer_types must name all {layers} layers, got {len(kinds)}.")
    return kinds


def _layer_windows(text: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = text.get("sliding_window")
    if window is None or text.get("use_sliding_window") is False:
        return (None,) * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in _layer_kinds(text, layers))


def _layer_ropes(text: Mapping[str, Any], head_dim: int, layers: int) -> tuple[RopeConfig | None, ...]:
    """Both layouts: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters` (one, or one per layer type)."""
    if text.get("model_type") in _WITHOUT_ROPE:
        return (None,) * layers
    parameters = text.get("rope_parameters") or {}
    if "full_attention" in parameters:
        per_kind = {kind: _rope(text, head_dim, options) for kind, options in parameters.items()}
        return tuple(per_kind[kind] for kind in _layer_kinds(text, layers))
    main = _rope(text, head_dim, parameters or text.get("rope_scaling") or {})
    if text.get("model_type") == "gemma3_text":
        local = _rope(text, head_dim, {"rope_theta": text["rope_local_base_freq"]})
        return tuple(local if kind == "sliding_attention" else main for kind in _layer_kinds(text, layers))
    return (main,) * layers


_ROPE_OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}


def _rope(text: Mapping[str, Any], head_dim: int, options: Mapping[str, Any]) -> RopeConfig:
    kind = str(options.get("rope_type") or options.get("type") or "default")
    if kind == "su" or (kind == "yarn" and text.get("model_type") == "phi3"):
        kind = "longrope"  # its names in Phi-3's first files
    if kind not in _ROPE_OPTIONS:
        raise ModelError(f"rope scaling {kind!r} is not supported; one of {', '.join(_ROPE_OPTIONS)} is.")
    theta = options.get("rope_theta") or text.get("rope_theta") or 10000.0
    share = options.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 1.0
    rotary_dim = int(head_dim * float(share))
    known = {"original_max_position_embeddings": text.get("original_max_position_embeddings"), **options}
    known = {key: value for key, value in known.items() if value is not None}
    for name in _ROPE_OPTIONS[kind]:
        if name not in known:
            raise ModelError(f"rope scaling {kind!r} needs the field {name!r}.")
        if kind == "longrope" and len(known[name]) != rotary_dim // 2:
            raise ModelError(f"{name} must have {rotary_dim // 2} numbers, got {len(known[name])}.")
    return RopeConfig(
        theta=float(theta),
        rotary_dim=rotary_dim,
        kind=kind,
        options={"max_position_embeddings": int(text["max_position_embeddings"]), **known},
    )
