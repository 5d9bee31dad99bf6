"""What configurations say: published ones are understood, and every variant that is not computed is refused by its field."""

from __future__ import annotations

from typing import Any

import pytest

from quire.config import EngineConfig
from quire.errors import ConfigError, ModelError
from quire.quant.scheme import Form, Scheme, form_at_load, parse, scheme_of
from tests.quant.test_layouts import AWQ, CT4, GPTQ

GROUP = CT4["config_groups"]["group_0"]


def ct(layout: str, activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """A compressed-tensors configuration as llm-compressor writes it."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*gate$"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.5,
        "config_groups": {"group_0": group},
    }


EIGHT_BITS = ct("int-quantized")["config_groups"]["group_0"]
PUBLISHED = [
    (AWQ, Scheme("awq", Form("int4", 32), "awq")),
    ({**AWQ, "version": "GEMM", "modules_to_not_convert": None, "group_size": 128}, Scheme("awq", Form("int4", 128), "awq")),
    ({**GPTQ, "damp_percent": 0.01, "static_groups": False}, Scheme("gptq", Form("int4", 32), "gptq", 1)),
    ({**GPTQ, "checkpoint_format": "gptq_v2", "desc_act": True}, Scheme("gptq", Form("int4", 32), "gptq", 0, True)),
    ({**GPTQ, "group_size": -1, "dynamic": {"-:.*down.*": {}}}, Scheme("gptq", Form("int4"), "gptq", 1)),
    (CT4, Scheme("compressed-tensors", Form("int4", 32), "pack-quantized")),
    (ct("int-quantized", {"num_bits": 8, "dynamic": True}), Scheme("compressed-tensors", Form("int8"), "quantized")),
    (ct("float-quantized", type="float", strategy="tensor"), Scheme("compressed-tensors", Form("fp8"), "quantized")),
    (
        ct("pack-quantized", num_bits=4, strategy="group", group_size=128, actorder="weight"),
        Scheme("compressed-tensors", Form("int4", 128), "pack-quantized"),
    ),
    ({"quant_method": "fp8", "activation_scheme": "static"}, Scheme("fp8", Form("fp8"), "quantized")),
]


@pytest.mark.parametrize(("stored", "scheme"), PUBLISHED)
def test_published_configurations(stored: dict[str, Any], scheme: Scheme) -> None:
    assert parse(stored) == scheme
    assert scheme_of({"quantization_config": stored}, None) == scheme
    assert scheme_of({"quantization_config": stored}, scheme.method) == scheme


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method must be one of awq, gptq, .*got 'bitsandbytes'"),
        ({}, "quant_method must be one of"),
        ({**AWQ, "bits": 8}, "bits must be 4, got 8"),
        ({**AWQ, "version": "gemv"}, "version must be gemm, got 'gemv'"),
        ({**AWQ, "zero_point": False}, "zero_point must be True, got False"),
        ({**AWQ, "group_size": 48}, "group_size must be -1 or a multiple of 32, got 48"),
        ({**GPTQ, "bits": 3}, "bits must be 4, got 3"),
        ({**GPTQ, "group_size": 16}, "group_size must be -1 or a multiple of 32, got 16"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format must be gptq, gptq_v2, got 'marlin'"),
        ({**GPTQ, "dynamic": {r"+:.*\.18\..*": {"bits": 8}}}, "dynamic may only leave modules out"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"weight_block_size must be absent, got \[128, 128\]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt must be e4m3"),
        (ct("marlin-24"), "format must be int-quantized, .*got 'marlin-24'"),
        (ct("int-quantized", symmetric=False), r"config_groups\.group_0\.weights\.symmetric must be True, got False"),
        (ct("int-quantized", strategy="group"), "strategy must be channel, tensor, got 'group'"),
        (ct("pack-quantized", num_bits=8), "format must be int-quantized, naive-quantized, got 'pack-quantized'"),
        (ct("pack-quantized", num_bits=4, strategy="group", group_size=16), "weights.group_size must be -1 or a multiple"),
        (ct("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="odd"), "actorder must be"),
        (ct("float-quantized", type="float", strategy="block"), "strategy must be channel, tensor, got 'block'"),
        (ct("float-quantized", type="float", num_bits=4), "num_bits must be 8, got 4"),
        (
            {**ct("int-quantized"), "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}},
            "sparsity_config.format must be dense, got 'sparse-24-bitmask'",
        ),
        (
            {**ct("int-quantized"), "sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}},
            "sparsity_config.sparsity_structure must be unstructured, absent, got '2:4'",
        ),
        ({**ct("int-quantized"), "transform_config": {"config_groups": {"u": {}}}}, "transform_config must be empty"),
        ({**ct("int-quantized"), "config_groups": {}}, "must name at least one group"),
        (
            {**ct("int-quantized"), "config_groups": {"a": EIGHT_BITS, "b": {**GROUP, "format": "pack-quantized"}}},
            "config_groups must agree on the form of weights, got 2 that differ",
        ),
    ],
)  # fmt: skip
def test_refusals_name_the_field(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        parse(stored)
    assert str(caught.value).startswith("config.json: quantization_config")


def test_wishes_and_files() -> None:
    assert scheme_of({}, None) is None
    assert scheme_of({}, "int4") == Scheme("int4", Form("int4"))
    assert scheme_of({}, "fp8").at_load
    with pytest.raises(ConfigError, match="must be one of int8, int4, fp8 for a model whose weights are dense, got 'awq'"):
        scheme_of({}, "awq")
    with pytest.raises(ConfigError, match="quantization must be 'awq' or not given for this model, got 'int8'"):
        scheme_of({"quantization_config": AWQ}, "int8")
    with pytest.raises(ConfigError, match=r'quantization must be one of int8.*Did you mean "int8"'):
        EngineConfig("m", quantization="int-8")


def test_what_is_quantized_at_load() -> None:
    def form(module: str, inputs: int = 256, kind: str = "int4", tied: bool = False) -> Form | None:
        return form_at_load(kind, module, inputs, tied)

    assert form("model.layers.3.self_attn.q_proj") == Form("int4", 128)
    assert form("model.layers.3.mlp.down_proj", 192) == Form("int4", 64)
    assert form("model.layers.3.mlp.down_proj", 96) == Form("int4", 32)
    assert form("model.layers.3.mlp.down_proj", 100) is None
    assert form("model.layers.3.mlp.down_proj", 100, "int8") == Form("int8")
    assert form("transformer.h.0.attn.c_attn") == form("h.0.mlp.c_fc") == Form("int4", 128)
    assert form("model.layers.3.mlp.gate") is None
    assert form("model.layers.3.block_sparse_moe.gate") is None
    assert form("model.layers.3.block_sparse_moe.experts.0.w1") == Form("int4", 128)
    assert form("model.decoder.project_in") is None
    assert form("lm_head") == form("lm_head", kind="int8") == Form("int8")
    assert form("lm_head", kind="fp8") is None
    assert form("model.embed_tokens") is None
    assert form("model.embed_tokens", tied=True) == form("transformer.wte", tied=True) == Form("int8")
    assert form("transformer.wpe", tied=True) is None
