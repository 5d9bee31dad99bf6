"""Which form the weights of a model's linear layers have: as their files say, or as was wished for at load. Knows no torch.

`quantization_config` of config.json is read strictly: a variant that is not computed here is refused by the name of its field,
before anything is loaded. *Which* modules are quantized is told by the files (`ignore`, `modules_to_not_convert` and targets
only repeat it); *how* to read them is told by the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.errors import ConfigError, ModelError

AT_LOAD = ("int8", "int4", "fp8")
IN_FILES = ("awq", "gptq", "compressed-tensors", "fp8")
GROUPS = (128, 64, 32)
SMALLEST_GROUP = 32

_LAYER = re.compile(r"(^|\.)(layers|h)\.\d+\.")
_ROUTERS = ("mlp.gate", "block_sparse_moe.gate")
HEAD = "lm_head"
TABLES = ("embed_tokens", "wte")


@dataclass(frozen=True)
class Form:
    """How one weight is kept. kind: int8 | int4 | fp8. group_size: of int4, None for one group a row."""

    kind: str
    group_size: int | None = None


@dataclass(frozen=True)
class Scheme:
    """How the quantized weights of one model are stored in its files, or (layout None) made at load.

    method: the name in configurations and on the command line. layout: awq | gptq | pack-quantized | quantized.
    zero_offset: what a stored zero lacks (1 in GPTQ's first format).
    """

    method: str
    form: Form
    layout: str | None = None
    zero_offset: int = 0
    act_order: bool = False

    @property
    def at_load(self) -> bool:
        return self.layout is None


def scheme_of(raw: Mapping[str, Any], wish: str | None) -> Scheme | None:
    """The scheme of a model whose config.json is `raw`, None where all weights are dense.

    Raises ModelError for a variant that is not supported, ConfigError for a wish that contradicts the files.
    """
    stored = raw.get("quantization_config") or raw.get("compression_config")
    if not stored:
        if wish is None:
            return None
        if wish not in AT_LOAD:
            raise ConfigError(
                f"quantization must be one of {', '.join(AT_LOAD)} for a model whose weights are dense, got {wish!r}, "
                "which needs a checkpoint that was stored so."
            )
        return Scheme(wish, Form(wish))
    scheme = parse(stored)
    if wish not in (None, scheme.method):
        raise ConfigError(
            f"quantization must be {scheme.method!r} or not given for this model, got {wish!r}: its files are {scheme.method}."
        )
    return scheme


def form_at_load(kind: str, module: str, inputs: int, tied: bool) -> Form | None:
    """What quantizing at load makes of the matrix of `module` (a name in the tree or in a file); None: it stays dense.

    All linears of the layers but routers. The head as int8 for int8 and int4: it decides between tokens, and a mistake in it
    is not mended by a later layer (docs/decisions/0006-quantized-weights.md); a tied one is the token table too.
    """
    leaf = module.rpartition(".")[2]
    if leaf == HEAD or (tied and leaf in TABLES):
        return Form("int8") if kind != "fp8" else None
    if not _LAYER.search(module) or module.endswith(_ROUTERS):
        return None
    if kind != "int4":
        return Form(kind)
    group = next((size for size in GROUPS if inputs % size == 0), None)
    return None if group is None else Form("int4", group)


def parse(stored: Mapping[str, Any]) -> Scheme:
    """The scheme that a `quantization_config` describes. Raises ModelError naming the field, what it may be, and its value."""
    if not isinstance(stored, Mapping):
        raise ModelError(f"config.json: quantization_config must be an object, got {stored!r}.")
    method = str(stored.get("quant_method", "")).lower().replace("_", "-")
    if method not in _PARSERS:
        raise ModelError(
            f"config.json: quantization_config.quant_method must be one of {', '.join(IN_FILES)}, "
            f"got {stored.get('quant_method')!r}."
        )
    return _PARSERS[method](stored)


def _awq(stored: Mapping[str, Any]) -> Scheme:
    _must(stored, "version", ("gemm",), "gemm", lower=True)
    _must(stored, "bits", (4,), None)
    _must(stored, "zero_point", (True,), True)
    return Scheme("awq", Form("int4", _group("group_size", stored.get("group_size"))), "awq")


def _gptq(stored: Mapping[str, Any]) -> Scheme:
    _must(stored, "bits", (4,), None)
    _must(stored, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    _must(stored, "is_marlin_format", (False,), False)
    _must(stored, "pack_dtype", ("int32",), "int32")
    _must(stored, "quant_method", ("gptq",), None)
    positive = [name for name in stored.get("dynamic") or {} if not str(name).startswith("-")]
    if positive:
        raise ModelError(
            f"config.json: quantization_config.dynamic may only leave modules out ('-:...'), got {positive[0]!r}: "
            "modules with widths of their own are not supported."
        )
    return Scheme(
        "gptq",
        Form("int4", _group("group_size", stored.get("group_size"))),
        "gptq",
        zero_offset=0 if stored.get("checkpoint_format") == "gptq_v2" else 1,
        act_order=bool(stored.get("desc_act", False)),
    )


def _fp8(stored: Mapping[str, Any]) -> Scheme:
    _must(stored, "weight_block_size", (None,), None)
    _must(stored, "activation_scheme", ("dynamic", "static"), "dynamic")
    _must(stored, "fmt", ("e4m3",), "e4m3")
    return Scheme("fp8", Form("fp8"), "quantized")


_CT_FORMATS = ("int-quantized", "pack-quantized", "float-quantized", "naive-quantized", "dense")


def _compressed_tensors(stored: Mapping[str, Any]) -> Scheme:
    _must(stored, "quantization_status", ("compressed", "frozen"), "compressed")
    _must(stored, "format", _CT_FORMATS, None)
    sparsity = stored.get("sparsity_config") or {}
    if sparsity:
        _must(sparsity, "format", ("dense",), "dense", within="sparsity_config.")
        _must(sparsity, "sparsity_structure", ("unstructured", None), None, within="sparsity_config.")
    if stored.get("transform_config"):
        raise ModelError("config.json: quantization_config.transform_config must be empty: rotated weights are not supported.")
    groups = stored.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelError("config.json: quantization_config.config_groups must name at least one group.")
    schemes = {name: _ct_group(f"config_groups.{name}.", group, stored) for name, group in groups.items()}
    first, *others = schemes.values()
    if any(other != first for other in others):
        raise ModelError(
            f"config.json: quantization_config.config_groups must agree on the form of weights, got {len(schemes)} that differ."
        )
    return first


def _ct_group(within: str, group: Any, stored: Mapping[str, Any]) -> Scheme:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ModelError(f"config.json: quantization_config.{within}weights must be an object.")
    within_weights = within + "weights."

    def must(name: str, allowed: tuple[Any, ...], default: Any) -> Any:
        return _must(weights, name, allowed, default, within=within_weights)

    layout = group.get("format") or stored["format"]
    must("dynamic", (False,), False)
    must("block_structure", (None,), None)
    kind, bits = must("type", ("int", "float"), "int"), weights.get("num_bits")
    if kind == "float":
        must("num_bits", (8,), None)
        must("strategy", ("channel", "tensor"), None)
        must("symmetric", (True,), True)
        _must({"format": layout}, "format", ("float-quantized", "naive-quantized"), None, within=within)
        return Scheme("compressed-tensors", Form("fp8"), "quantized")
    if bits == 8:
        must("strategy", ("channel", "tensor"), None)
        must("symmetric", (True,), True)
        _must({"format": layout}, "format", ("int-quantized", "naive-quantized"), None, within=within)
        return Scheme("compressed-tensors", Form("int8"), "quantized")
    must("num_bits", (4, 8), None)
    strategy = must("strategy", ("group", "channel"), None)
    must("actorder", (None, False, True, "group", "weight", "static", "dynamic"), None)
    _must({"format": layout}, "format", ("pack-quantized",), None, within=within)
    size = None if strategy == "channel" else _group(within_weights + "group_size", weights.get("group_size"))
    ordered = weights.get("actorder") in (True, "group", "dynamic")
    return Scheme("compressed-tensors", Form("int4", size), "pack-quantized", act_order=ordered)


_PARSERS = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed_tensors}


def _group(field: str, size: Any) -> int | None:
    """A group's size; None for -1, the whole row."""
    if size == -1:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < SMALLEST_GROUP or size % SMALLEST_GROUP:
        raise ModelError(
            f"config.json: quantization_config.{field} must be -1 or a multiple of {SMALLEST_GROUP}, got {size!r}."
        )
    return size


def _must(
    fields: Mapping[str, Any], name: str, allowed: tuple[Any, ...], default: Any, *, within: str = "", lower: bool = False
) -> Any:
    value = fields.get(name)
    value = default if value is None else value.lower() if lower and isinstance(value, str) else value
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
        shown = ", ".join("absent" if choice is None else str(choice) for choice in allowed)
        raise ModelError(f"config.json: quantization_config.{within}{name} must be {shown}, got {value!r}.")
    return value
