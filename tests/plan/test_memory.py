"""The plan: what it computes, where each value comes from, and that nothing about it jumps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.config import EngineConfig
from quire.errors import ConfigError, DoesNotFit
from quire.plan.activations import activation_bytes
from quire.plan.memory import RUNTIME_BYTES, Plan, find_plan, make_plan
from tests.plan.models import GIB, machine, shape

WEIGHTS = GIB
MANY = settings(max_examples=1500, deadline=None)


def plan(free: float = 8.0, weights: int = WEIGHTS, model: Any = None, **wishes: Any) -> Plan:
    return make_plan(EngineConfig("m", **wishes), model or shape(), weights, machine(int(free * GIB)))


def test_bytes_of_a_block_are_exact() -> None:
    assert plan().bytes_per_block == 2 * 24 * 16 * 4 * 64 * 2
    assert plan(block_size=32).bytes_per_block == 2 * 24 * 32 * 4 * 64 * 2
    assert plan(free=16, dtype="float32").bytes_per_block == 2 * 24 * 16 * 4 * 64 * 4


@pytest.mark.parametrize("wish, name", [("fp8", "fp8_e4m3"), *((name, name) for name in ("fp8_e4m3", "fp8_e5m2", "int8"))])
def test_a_cache_of_one_byte_per_number_holds_twice_the_tokens(wish: str, name: str) -> None:
    full, half = plan(free=2), plan(free=2, kv_cache_dtype=wish)
    assert (full.kv_cache_dtype, half.kv_cache_dtype) == ("bfloat16", name)
    assert half.bytes_per_block * 2 == full.bytes_per_block
    assert abs(half.kv_tokens - 2 * full.kv_tokens) <= 2 * full.block_size
    assert f"12.0 KiB per token as {name})" in "\n".join(half.describe())
    assert plan(free=16, dtype="float32").kv_cache_dtype == "float32"


@pytest.mark.parametrize(
    "stored, wish, factor, dtype",
    [
        ("bfloat16", "auto", 1, "bfloat16"),
        ("float16", "auto", 1, "bfloat16"),
        ("float16", "half", 1, "float16"),
        ("bfloat16", "float32", 2, "float32"),
        ("float32", "bfloat16", 0.5, "bfloat16"),
    ],
)
def test_weights_are_counted_in_the_type_they_are_loaded_as(stored: str, wish: str, factor: float, dtype: str) -> None:
    made = plan(free=16, model=shape(torch_dtype=stored), dtype=wish)
    assert (made.weight_bytes, made.dtype) == (WEIGHTS * factor, dtype)


def test_defaults_and_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = plan(free=64)
    assert (made.max_num_seqs, made.max_num_batched_tokens, made.max_model_len, made.threads) == (256, 2048, 8192, 4)
    assert made.memory_budget == int(0.9 * 64 * GIB)
    assert made.reasons["max_num_seqs"] == made.reasons["max_num_batched_tokens"] == "default"
    assert made.reasons["max_model_len"] == "model"
    assert made.reasons["threads"] == "plan"
    flagged = plan(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=512, threads=1)
    names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "threads")
    assert {flagged.reasons[name] for name in names} == {"flag"}
    assert (flagged.max_num_seqs, flagged.max_num_batched_tokens, flagged.max_model_len, flagged.threads) == (4, 256, 512, 1)


def test_everything_is_within_the_budget_and_nothing_useful_is_left() -> None:
    made = plan(free=4)
    assert made.needed_bytes <= made.memory_budget
    assert made.memory_budget - made.needed_bytes < made.bytes_per_block
    assert made.kv_bytes == (made.num_blocks + 1) * made.bytes_per_block
    assert made.activation_bytes == activation_bytes(shape(), 2, made.max_num_batched_tokens, made.max_num_seqs)


def test_the_cache_is_not_larger_than_useful() -> None:
    made = plan(free=64, max_num_seqs=2, max_model_len=100)
    assert made.num_blocks == 2 * 7
    assert made.max_concurrency == 2.0
    assert made.kv_tokens == 2 * 7 * 16


def test_more_sequences_than_tokens_in_a_step_are_cut_and_told() -> None:
    made = plan(max_num_seqs=256, max_num_batched_tokens=64)
    assert made.max_num_seqs == 64
    assert "flag 256" in made.reasons["max_num_seqs"]
    assert plan(max_num_batched_tokens=64).max_num_seqs == 64


@pytest.mark.parametrize("auto", ["auto", -1])
def test_auto_is_exactly_the_longest_that_fits(auto: int | str) -> None:
    for free in (1.6, 1.7, 1.8, 1.9):
        long = shape(max_position_embeddings=1 << 20)
        made = plan(free=free, model=long, max_model_len=auto)
        assert made.max_model_len < 1 << 20
        assert made.reasons["max_model_len"] == "plan, the largest that fits"
        assert plan(free=free, model=long, max_model_len=made.max_model_len).num_blocks >= made.max_model_len // 16
        with pytest.raises(DoesNotFit):
            plan(free=free, model=long, max_model_len=made.max_model_len + 16)


def test_auto_with_room_is_the_models_own_length() -> None:
    assert (plan(free=64, max_model_len="auto").max_model_len, plan(free=64, max_model_len=-1).max_model_len) == (8192, 8192)


def test_length_beyond_the_model_is_a_wrong_option() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len must be at most 8192 .* got 8193"):
        plan(max_model_len=8193)


def test_stated_cache_sizes_win() -> None:
    made = plan(num_gpu_blocks_override=40, max_model_len=512, gpu_memory_utilization=0.5)
    assert made.num_blocks == 40
    assert made.reasons["num_blocks"] == "flag"
    assert made.reasons["gpu_memory_utilization"] == "flag, overridden by num_gpu_blocks_override"
    assert (made.max_num_seqs, made.max_num_batched_tokens) == (256, 2048)
    made = plan(kv_cache_memory_bytes=41 * made.bytes_per_block + 5, max_model_len=512)
    assert made.num_blocks == 40
    assert plan(num_gpu_blocks_override=33, kv_cache_memory_bytes=GIB, max_model_len=512).num_blocks == 33


def test_stated_cache_must_exist_and_hold_a_request() -> None:
    with pytest.raises(DoesNotFit, match="holds 48 tokens, one request may have 49"):
        plan(num_gpu_blocks_override=3, max_model_len=49)
    with pytest.raises(DoesNotFit, match=r"needs .* this machine can give 4\.0 GiB \(100%"):
        plan(free=4, kv_cache_memory_bytes=8 * GIB, max_model_len=512)
    # Its size is not bound by the share, only by what is there.
    assert plan(free=4, kv_cache_memory_bytes=2 * GIB, max_model_len=512, gpu_memory_utilization=0.1).kv_bytes <= 2 * GIB


def test_presets_pass_through_the_plan() -> None:
    made = plan(free=64, preset="chat")
    assert (made.max_model_len, made.reasons["max_model_len"]) == (4096, "preset")
    made = plan(free=64, preset="low-latency")
    assert (made.max_num_seqs, made.max_num_batched_tokens) == (32, 512)
    assert plan(free=64, preset="memory").memory_budget == int(0.8 * 64 * GIB)
    assert plan(free=64, preset="memory", max_num_seqs=3).max_num_seqs == 3
    small = shape(max_position_embeddings=1024)
    assert plan(free=64, preset="chat", model=small).max_model_len == 1024
    tight = plan(free=1.5, preset="chat")
    assert tight.max_model_len < 4096
    assert tight.reasons["max_model_len"] == "plan, lowered from preset 4096"


def test_defaults_give_way_before_the_plan_fails() -> None:
    wide = shape(vocab_size=500_000)
    tight = plan(free=1.75, model=wide)
    assert tight.max_num_seqs < 256 or tight.max_num_batched_tokens < 2048
    lowered = [name for name, reason in tight.reasons.items() if reason.startswith("plan, lowered from default")]
    assert lowered


def test_description_has_vllms_lines() -> None:
    text = "\n".join(plan(free=4).describe())
    assert "KV cache size: " in text
    assert "Maximum concurrency for 8,192 tokens per request: " in text
    for part in ("weights", "activations", "runtime", "KV cache", "unused"):
        assert part in text


def test_sequences_that_fit() -> None:
    made = plan(num_gpu_blocks_override=64, max_model_len=256, max_num_seqs=10)
    assert [made.sequences_that_fit(tokens) for tokens in (1, 16, 17, 128, 256, 1024)] == [10, 10, 10, 8, 4, 1]


SHAPES = st.builds(
    shape,
    num_hidden_layers=st.integers(1, 40),
    num_attention_heads=st.just(16),
    num_key_value_heads=st.sampled_from([1, 4, 16]),
    intermediate_size=st.sampled_from([512, 2816, 11008]),
    vocab_size=st.sampled_from([320, 32000, 262144]),
    max_position_embeddings=st.sampled_from([100, 2048, 131072]),
    torch_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
WISHES = st.fixed_dictionaries(
    {},
    optional={
        "max_model_len": st.one_of(st.just("auto"), st.integers(1, 100)),
        "max_num_seqs": st.integers(1, 512),
        "max_num_batched_tokens": st.integers(1, 8192),
        "block_size": st.sampled_from([8, 16, 32, 128]),
        "gpu_memory_utilization": st.floats(0.2, 1.0),
        "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
        "kv_cache_dtype": st.sampled_from(["auto", "fp8", "int8"]),
        "preset": st.sampled_from(["chat", "throughput", "low-latency", "memory"]),
    },
)
FREE = st.integers(64 << 20, 12 * GIB)
BYTES = st.integers(1 << 20, 4 * GIB)


@MANY
@given(SHAPES, WISHES, FREE, BYTES, st.integers(0, 8 * GIB))
def test_more_memory_never_makes_a_fitting_plan_fail(model: Any, wishes: dict, free: int, weights: int, more: int) -> None:
    config = EngineConfig("m", **wishes)
    small, large = find_plan(config, model, weights, machine(free)), find_plan(config, model, weights, machine(free + more))
    if small is not None:
        assert large is not None
        assert large.max_model_len >= small.max_model_len
        assert small.needed_bytes <= small.memory_budget
        assert small.num_blocks * small.block_size >= small.max_model_len


@MANY
@given(SHAPES, WISHES, FREE, BYTES, st.data())
def test_a_lower_limit_never_makes_a_fitting_plan_fail(model: Any, wishes: dict, free: int, weights: int, data: Any) -> None:
    config = EngineConfig("m", **wishes)
    fitting = find_plan(config, model, weights, machine(free))
    if fitting is None:
        return
    name = data.draw(st.sampled_from(["max_model_len", "max_num_seqs", "max_num_batched_tokens"]))
    lower = data.draw(st.integers(1, getattr(fitting, name)))
    assert find_plan(replace(config, **{name: lower}), model, weights, machine(free)) is not None
    # And what the plan itself says is a wish that is granted.
    said = {n: getattr(fitting, n) for n in ("max_model_len", "max_num_seqs", "max_num_batched_tokens")}
    assert find_plan(replace(config, **said), model, weights, machine(free)) is not None


@MANY
@given(SHAPES, st.integers(1, 512), st.integers(1, 8192), st.integers(0, 512), st.integers(0, 8192))
def test_activations_grow_with_the_step(model: Any, seqs: int, tokens: int, more_seqs: int, more_tokens: int) -> None:
    small = activation_bytes(model, 2, tokens, min(seqs, tokens))
    assert small <= activation_bytes(model, 2, tokens + more_tokens, min(seqs + more_seqs, tokens + more_tokens))


def test_constants_agree_with_the_operations_they_describe() -> None:
    from quire.ops.reference import attention
    from quire.plan import activations
    from quire.sampling import sampler

    assert (activations.SPAN, activations.TILE, activations.MOST_GATHERED) == (
        attention.SPAN,
        attention.TILE,
        attention.MOST_GATHERED,
    )
    assert activations.PIECE == sampler.PIECE
    assert RUNTIME_BYTES > 150 << 20
