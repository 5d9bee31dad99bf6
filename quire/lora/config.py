"""What an adapter is, in PEFT's words: `adapter_config.json` parsed strictly and written back. Knows no torch and no model.

What Quire cannot compute is refused by the field's name; a field that changes nothing is kept out or stated in the log.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.errors import AdapterError, did_you_mean
from quire.log import logger
from quire.lora.patterns import problem_of

log = logger(__name__)

ALL_LINEAR = "all-linear"
MOST_RANK = 4096
# The version of PEFT's format that is written.
PEFT_VERSION = "0.21.2"

# How A and B started. The second kind changes the base too, so that its files mean something else on the plain base.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")

# Fields of PEFT that make another computation: name -> what to do instead.
REFUSED = {
    "alora_invocation_tokens": "activated LoRA is not supported; train a plain LoRA",
    "use_bdlora": "block-diagonal LoRA is not supported; train a plain LoRA",
    "use_qalora": "QALoRA pools its inputs; train a plain LoRA (Quire's base may be quantized without it)",
    "kasa_config": "KaSA is not supported; merge it into the base with PEFT, or train a plain LoRA",
    "layer_replication": "replicated layers are another base model; merge with PEFT and serve the merged folder",
    "megatron_config": "Megatron's parallel layers are not supported; save the adapter without megatron_config",
    "arrow_config": "Arrow routes between adapters; load the adapters one by one",
    "velora_config": "VeLoRA is not supported; train a plain LoRA",
    "monteclora_config": "MonteCLoRA samples its weights; train a plain LoRA",
}  # fmt: skip
# Keys that change nothing once A and B are there.
PASSED_OVER = {
    "peft_type", "peft_version", "auto_mapping", "inference_mode", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "megatron_core", "runtime_config",
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's fields under PEFT's names, with PEFT's defaults; but `target_modules` of a new adapter is "all-linear".

    target_modules: names or endings of module paths, a regular expression over whole paths, or "all-linear".
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] | None = None
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its path."""
        return _first_match(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        return _first_match(self.alpha_pattern, module, self.lora_alpha)

    def scale_of(self, module: str) -> float:
        """What B A x is multiplied by: alpha / r, or alpha / sqrt(r) (rank-stabilized)."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_json(self) -> dict[str, Any]:
        """adapter_config.json with every key that PEFT writes, sorted by name."""
        own = {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            if isinstance(own[name], list):
                own[name] = sorted(own[name])
        constant = {
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
            "auto_mapping": None,
            "inference_mode": True,
            "layer_replication": None,
            "alora_invocation_tokens": None,
            "use_qalora": False,
            "qalora_group_size": 16,
            "use_bdlora": None,
            "loftq_config": {},
            "eva_config": None,
            "corda_config": None,
            "lora_ga_config": None,
            "velora_config": None,
            "kasa_config": None,
            "monteclora_config": None,
            "arrow_config": None,
            "megatron_config": None,
            "megatron_core": "megatron.core",
        }
        return dict(sorted({**own, **constant}.items()))


def _first_match(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that ends at a dot of the path, as PEFT matches them."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples, whole numbers without a point."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse_lora_config(raw: Mapping[str, Any]) -> LoraConfig:
    """The configuration in `raw`. Raises AdapterError that names the field, its value and what is expected.

    Absent fields have PEFT's defaults; absent or null `target_modules` stays None (a reader takes what the tensors say).
    """
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        raise _wrong("peft_type", kind, "LORA; other kinds of adapters are not supported")
    for name, advice in REFUSED.items():
        if raw.get(name):
            raise _wrong(name, raw[name], f"null: {advice}")
    known = set(LoraConfig.__dataclass_fields__)
    unknown = sorted(set(raw) - known - set(REFUSED) - PASSED_OVER)
    if unknown:
        guess = did_you_mean(unknown[0], known)
        log.warning("adapter_config.json has fields that are not known here and not used: %s.%s", ", ".join(unknown), guess)
    config = LoraConfig(
        r=_whole(raw, "r", 8, 1, MOST_RANK),
        lora_alpha=_number(raw, "lora_alpha", 8),
        lora_dropout=_fraction(raw, "lora_dropout"),
        target_modules=_names_or_pattern(raw, "target_modules"),
        exclude_modules=_names_or_pattern(raw, "exclude_modules"),
        target_parameters=_names(raw, "target_parameters"),
        bias=_one_of(raw, "bias", "none", ("none", "all", "lora_only")),
        init_lora_weights=_start(raw),
        modules_to_save=_names(raw, "modules_to_save"),
        layers_to_transform=_layers(raw),
        layers_pattern=_names(raw, "layers_pattern", single=True),
        rank_pattern=_patterns(raw, "rank_pattern"),
        alpha_pattern=_patterns(raw, "alpha_pattern"),
        trainable_token_indices=_tokens(raw),
        **{
            name: _flag(raw, name)
            for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
        },
        **{name: _text(raw, name) for name in ("base_model_name_or_path", "revision", "task_type")},
    )
    _check_together(config)
    return config


def _check_together(config: LoraConfig) -> None:
    if config.layers_pattern and config.layers_to_transform is None:
        raise _wrong("layers_pattern", config.layers_pattern, "null, unless layers_to_transform is given")
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None and isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR:
            raise _wrong(name, getattr(config, name), "null, because target_modules is a regular expression")
    if config.lora_bias and config.use_dora:
        raise _wrong("lora_bias", True, "false with use_dora: their product is not defined")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise _wrong("task_type", config.task_type, "CAUSAL_LM or null")


def _wrong(name: str, value: Any, expected: str) -> AdapterError:
    shown = repr(value)
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    return AdapterError(f"{name} is {shown}; expected {expected}.", parameter=name)


def _whole(raw: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = raw.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise _wrong(name, value, f"a whole number from {low} to {high}")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if not _is_number(value):
        raise _wrong(name, value, "a number")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _fraction(raw: Mapping[str, Any], name: str) -> float:
    value = raw.get(name, 0.0)
    if not _is_number(value) or not 0 <= value < 1:
        raise _wrong(name, value, "a number from 0 to below 1")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _text(raw: Mapping[str, Any], name: str) -> str | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong(name, value, "a text or null")
    return value


def _one_of(raw: Mapping[str, Any], name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = raw.get(name, default)
    if value not in allowed:
        raise _wrong(name, value, " or ".join(allowed))
    return value


def _names(raw: Mapping[str, Any], name: str, *, single: bool = False) -> tuple[str, ...] | None:
    value = raw.get(name)
    if single and isinstance(value, str):
        value = [value] if value else None
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(one, str) and one for one in value):
        raise _wrong(name, value, "a list of names or null")
    for one in value if name in ("modules_to_save", "layers_pattern") else ():
        _check_pattern(name, one)  # PEFT takes these for patterns
    return tuple(dict.fromkeys(value))


def _names_or_pattern(raw: Mapping[str, Any], name: str) -> tuple[str, ...] | str | None:
    value = raw.get(name)
    if not isinstance(value, str):
        return _names(raw, name)
    if value != ALL_LINEAR:
        _check_pattern(name, value)
    return value


def _check_pattern(name: str, pattern: str) -> None:
    problem = problem_of(pattern)
    if problem is not None:
        raise _wrong(name, pattern, f"a regular expression {problem}")


def _patterns(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(name, value, "an object of module patterns and numbers")
    for key, one in value.items():
        _check_pattern(name, key)
        if name == "rank_pattern" and not (type(one) is int and 1 <= one <= MOST_RANK):
            raise _wrong(f"rank_pattern[{key!r}]", one, f"a whole number from 1 to {MOST_RANK}")
        if not _is_number(one):
            raise _wrong(f"{name}[{key!r}]", one, "a number")
    return dict(value)


def _layers(raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = raw.get("layers_to_transform")
    if value is None or value == []:
        return None
    value = [value] if type(value) is int else value
    if not isinstance(value, (list, tuple)) or not all(type(one) is int and one >= 0 for one in value):
        raise _wrong("layers_to_transform", value, "a layer's number, a list of them, or null")
    return tuple(value)


def _tokens(raw: Mapping[str, Any]) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    value = raw.get("trainable_token_indices")
    if not value:
        return None

    def tokens(one: Any) -> tuple[int, ...]:
        if not isinstance(one, (list, tuple)) or not all(type(token) is int and token >= 0 for token in one):
            raise _wrong("trainable_token_indices", one, "a list of token ids, or an object of such lists by module")
        return tuple(one)

    return {str(key): tokens(one) for key, one in value.items()} if isinstance(value, Mapping) else tokens(value)


def _start(raw: Mapping[str, Any]) -> bool | str:
    value = raw.get("init_lora_weights", True)
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str) and value.lower() in PLAIN_STARTS:
        return value
    if isinstance(value, str) and value.lower().startswith(CHANGED_BASES):
        raise _wrong(
            "init_lora_weights",
            value,
            "true or gaussian: this start changed the base's weights, so the adapter is wrong on the plain base. "
            "Convert it: save it from PEFT with save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    raise _wrong("init_lora_weights", value, "true, false, " + ", ".join(PLAIN_STARTS))
