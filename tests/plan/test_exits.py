"""When it does not fit: the message has sizes, and every way out that it names works."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from quire.config import EngineConfig
from quire.errors import DoesNotFit
from quire.plan.exits import diagnose
from quire.plan.memory import find_plan, make_plan
from tests.plan.models import GIB, machine, shape
from tests.plan.test_memory import BYTES, FREE, SHAPES, WISHES


def prove(config: EngineConfig, model: Any, weights: int, free: int) -> None:
    account = diagnose(config, model, weights, machine(free))
    assert account.exits
    for way in account.exits:
        changed = replace(config, **way.options)
        room = machine(way.memory_free if way.memory_free is not None else free)
        assert find_plan(changed, model, weights, room) is not None, way


@settings(max_examples=400, deadline=None)
@given(SHAPES, WISHES, FREE, BYTES)
def test_every_exit_fits(model: Any, wishes: dict, free: int, weights: int) -> None:
    config = EngineConfig("m", **wishes)
    if find_plan(config, model, weights, machine(free)) is None:
        prove(config, model, weights, free)


@pytest.mark.parametrize(
    "wishes",
    [
        {"num_gpu_blocks_override": 2},
        {"num_gpu_blocks_override": 1 << 30},
        {"kv_cache_memory_bytes": 1},
        {"kv_cache_memory_bytes": 1 << 50},
        {"kv_cache_memory_bytes": 1 << 22, "num_gpu_blocks_override": 5},
    ],
)
@pytest.mark.parametrize("free", [0.5, 3, 8])
def test_every_exit_of_a_stated_cache_fits(wishes: dict, free: float) -> None:
    prove(EngineConfig("m", **wishes), shape(), GIB, int(free * GIB))


def test_message_has_fact_causes_and_numbered_exits() -> None:
    with pytest.raises(DoesNotFit) as caught:
        make_plan(EngineConfig("some/model"), shape(max_position_embeddings=131072), GIB, machine(2 * GIB))
    lines = str(caught.value).splitlines()
    assert re.fullmatch(
        r"some/model does not fit: needs [\d.]+ GiB, this machine can give 1\.8 GiB \(90% of 2\.0 GiB free\)\.", lines[0]
    )
    for part in ("weights in bfloat16 1.0 GiB", "activations at 512 tokens", "KV cache for one request of 131072 tokens"):
        assert part in lines[1]
    assert lines[2] == "Choose one (each was computed and fits):"
    assert re.match(r"  1  --max-model-len \d+ ", lines[3])
    assert "of free memory" in lines[-1]


def test_longest_length_is_maximal() -> None:
    model = shape(max_position_embeddings=131072)
    account = diagnose(EngineConfig("m"), model, GIB, machine(2 * GIB))
    longest = account.exits[0].options["max_model_len"]
    assert find_plan(EngineConfig("m", max_model_len=longest), model, GIB, machine(2 * GIB)) is not None
    assert find_plan(EngineConfig("m", max_model_len=longest + 16), model, GIB, machine(2 * GIB)) is None


def test_memory_exit_is_the_least_that_works() -> None:
    account = diagnose(EngineConfig("m"), shape(), 4 * GIB, machine(2 * GIB))
    enough = account.exits[-1].memory_free
    assert enough is not None
    assert find_plan(EngineConfig("m"), shape(), 4 * GIB, machine(enough)) is not None
    assert find_plan(EngineConfig("m"), shape(), 4 * GIB, machine(enough - (1 << 30) // 10 - 1)) is None


def test_half_the_type_is_offered_for_float32() -> None:
    account = diagnose(EngineConfig("m", max_model_len=512), shape(torch_dtype="float32"), 2 * GIB, machine(2 * GIB))
    assert {"dtype": "bfloat16"} in [way.options for way in account.exits]


def test_fp8_cache_is_offered_with_what_it_gains() -> None:
    model = shape(max_position_embeddings=32768, num_key_value_heads=16)
    exits = diagnose(EngineConfig("m"), model, GIB, machine(5 * GIB)).exits
    way = next(way for way in exits if way.options == {"kv_cache_dtype": "fp8"})
    fitting = find_plan(EngineConfig("m", kv_cache_dtype="fp8"), model, GIB, machine(5 * GIB))
    limits = {"max_num_seqs": fitting.max_num_seqs, "max_num_batched_tokens": fitting.max_num_batched_tokens}
    full = find_plan(EngineConfig("m", max_model_len="auto", **limits), model, GIB, machine(5 * GIB))
    assert way.remark == f"{fitting.kv_tokens} tokens of KV cache where bfloat16 has room for {full.kv_tokens}"
    assert full.max_model_len < 32768

    # Where it is not enough by itself, it still makes the longest sequence about twice as long.
    exits = diagnose(EngineConfig("m"), model, GIB, machine(2 * GIB)).exits
    without, within = exits[0].options["max_model_len"], exits[1].options
    assert within["kv_cache_dtype"] == "fp8"
    assert 0 <= within["max_model_len"] - 2 * without <= 32  # the null block is there in both
    assert exits[1].remark == f"instead of 32768; {within['max_model_len'] - without} more than in bfloat16"
    exits = diagnose(EngineConfig("m", kv_cache_dtype="int8"), model, GIB, machine(2 * GIB)).exits
    assert not any("kv_cache_dtype" in way.options for way in exits)


def test_json_form() -> None:
    facts = diagnose(EngineConfig("m"), shape(), 4 * GIB, machine(2 * GIB)).as_dict()
    assert facts["fits"] is False
    assert facts["exits"][0]["command"]
