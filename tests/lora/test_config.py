"""adapter_config.json: what is read, what is refused and why, what is written."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import peft
import pytest

from quire.errors import AdapterError
from quire.lora.config import PEFT_VERSION, LoraConfig, parse_lora_config
from tests.lora.cases import CASES, Case


@pytest.mark.parametrize(
    "raw,field,said",
    [
        ({"peft_type": "IA3"}, "peft_type", "LORA"),
        ({"r": 0}, "r", "from 1 to"),
        ({"r": True}, "r", "whole number"),
        ({"r": 8.0}, "r", "whole number"),
        ({"lora_alpha": "16"}, "lora_alpha", "a number"),
        ({"lora_alpha": math.nan}, "lora_alpha", "a number"),
        ({"lora_dropout": 1.0}, "lora_dropout", "below 1"),
        ({"target_modules": [1]}, "target_modules", "list of names"),
        ({"target_modules": "("}, "target_modules", "regular expression"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules", "list of names"),
        ({"bias": "some"}, "bias", "none or all or lora_only"),
        ({"use_dora": 1}, "use_dora", "true or false"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']", "from 1 to"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern", "object"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern", "regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern['q_proj']", "a number"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform", "layer's number"),
        ({"layers_pattern": "layers"}, "layers_pattern", "layers_to_transform"),
        ({"target_modules": "a.*b", "layers_to_transform": [1]}, "layers_to_transform", "regular expression"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices", "token ids"),
        ({"task_type": "SEQ_CLS"}, "task_type", "CAUSAL_LM"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias", "use_dora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens", "plain LoRA"),
        ({"use_bdlora": {"nblocks": 4}}, "use_bdlora", "block-diagonal"),
        ({"use_qalora": True}, "use_qalora", "QALoRA"),
        ({"kasa_config": {"beta": 1}}, "kasa_config", "KaSA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication", "merge"),
        ({"megatron_config": {"a": 1}}, "megatron_config", "Megatron"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config", "Arrow"),
        ({"velora_config": {"a": 1}}, "velora_config", "VeLoRA"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config", "MonteCLoRA"),
        *(
            ({"init_lora_weights": start}, "init_lora_weights", "path_initial_model_for_weight_conversion")
            for start in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "mica")
        ),
        ({"init_lora_weights": "best"}, "init_lora_weights", "gaussian"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(raw: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(AdapterError) as raised:
        parse_lora_config(raw)
    assert raised.value.parameter == field
    assert field in str(raised.value)
    assert said in str(raised.value)
    assert raised.value.status == 400


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|b*)*c",
        "((x*)y?){2,}",
        "a*a*a*a*a*a*a*a*b",
        ".*.*.*.*.*.*.*x",
        "(.)*?(.+)+",
        "x" * 5000,
        "a?" * 25,
        "(a?){30}",
        "(?=a)b",
        r"(a)\1",
    ],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_patterns_that_may_take_forever_are_refused(field: str, pattern: str) -> None:
    """Python's matching cannot be stopped and holds the interpreter, so a folder could stop a server."""
    value = {pattern: 3} if field == "rank_pattern" else pattern
    with pytest.raises(AdapterError, match="regular expression"):
        parse_lora_config({field: value})


def test_patterns_that_tools_write_are_read() -> None:
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
        r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
    )
    config = parse_lora_config({"target_modules": unsloth, "rank_pattern": {r".*\.gate_up_proj": 16, r"layers\.\d+\.x": 2}})
    assert config.target_modules == unsloth


def test_unknown_keys_are_stated_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "quire"):
        config = parse_lora_config({"r": 4, "some_future_field": 1, "lora_alpa": 3})
    assert config.r == 4
    assert "some_future_field" in caplog.text
    assert 'Did you mean "lora_alpha"?' in caplog.text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pefts_own_file_is_read_and_written_back_key_by_key(case: Case, tmp_path: Path) -> None:
    case.config().save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = parse_lora_config(theirs).to_json()
    assert set(ours) == set(theirs)
    for key in theirs:
        if key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters") and isinstance(ours[key], list):
            assert ours[key] == sorted(theirs[key]), key
        elif key in ("layers_to_transform", "layers_pattern") and isinstance(theirs[key], (int, str)):
            assert ours[key] == [theirs[key]]
        elif key not in ("inference_mode", "peft_version"):  # what PEFT was just doing, a folder's is true; and its own release
            assert ours[key] == theirs[key], key
    assert ours["inference_mode"] is True
    assert ours["peft_version"] == PEFT_VERSION
    peft.LoraConfig(**{key: value for key, value in ours.items() if key not in ("peft_version", "auto_mapping")})


def test_ranks_alphas_and_scales_by_module() -> None:
    config = parse_lora_config(
        {
            "r": 8,
            "lora_alpha": 16.5,
            "rank_pattern": {r"layers\.1\.mlp\.down_proj": 2, "down_proj": 4, "q": 64},
            "alpha_pattern": {"down_proj": 3},
        }
    )
    assert config.rank_of("model.layers.0.mlp.down_proj") == 4
    assert config.rank_of("model.layers.1.mlp.down_proj") == 2
    assert config.rank_of("model.layers.1.self_attn.q_proj") == 8  # "q" is not a whole name
    assert config.scale_of("model.layers.0.mlp.down_proj") == 3 / 4
    assert config.scale_of("model.layers.0.self_attn.q_proj") == 16.5 / 8
    stable = parse_lora_config({"r": 16, "lora_alpha": 8, "use_rslora": True})
    assert stable.scale_of("anything") == 8 / math.sqrt(16)


def test_defaults_are_pefts() -> None:
    theirs, ours = peft.LoraConfig(), LoraConfig()
    for name in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "lora_bias", "init_lora_weights"):
        assert getattr(ours, name) == getattr(theirs, name), name
