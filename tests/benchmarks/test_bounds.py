"""The arithmetic of limits, on numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from benchmarks.engines.bounds import bound
from benchmarks.engines.roofline import Best, Limits, flags, measure
from benchmarks.engines.workloads import WORKLOADS, Workload
from benchmarks.random_model import SHAPES, Shape

# One layer of one weight by one; a vocabulary of ten.
TINY = Shape(hidden=1, layers=1, heads=1, kv_heads=1, intermediate=1, vocabulary=10)


def limits(reading: float = 1e3, **rates: float) -> Best:
    return Best((Limits("", reads={10: reading}, torch=rates),))


def test_one_stream_is_bound_by_reading() -> None:
    workload = Workload("x", "", "", 1, 4, 3)
    # Two steps, which read 100 bytes of weights and the keys and values of 5 and 6 tokens, 4 bytes each.
    assert bound(workload, TINY, "16-bit", 100, limits(bfloat16=1e9)) == pytest.approx(2 / ((120 + 124) / 1e3))


def test_a_prompt_is_bound_by_arithmetic() -> None:
    workload = Workload("x", "", "", 1, 4, 1)
    work = 2 * (4 * TINY.layer_weights + 10) + 4 * 10
    assert bound(workload, TINY, "16-bit", 1, limits(1e12, bfloat16=50.0)) == pytest.approx(4 / (work / 50))


def test_a_shared_prefix_is_computed_and_read_once() -> None:
    shape, fast = SHAPES["0.5b"], limits(30e9, bfloat16=1e12)
    whole = Workload("x", "", "", 32, 1056, 32)
    assert bound(WORKLOADS["W4"], shape, "16-bit", 1e9, fast) > 4 * bound(whole, shape, "16-bit", 1e9, fast)


def test_the_shape_weighs_what_the_model_weighs() -> None:
    shape = SHAPES["0.5b"]
    assert 2 * (shape.layer_weights + shape.head_weights) == pytest.approx(0.988e9, rel=0.001)
    for name, millions in {"0.5b": 494, "llama-1b": 1236, "0.1b": 134}.items():
        assert (SHAPES[name].layer_weights + SHAPES[name].head_weights) / 1e6 == pytest.approx(millions, rel=0.01)


def test_missing_limits_give_no_bound() -> None:
    assert bound(WORKLOADS["W1"], TINY, "8-bit", 1, limits(bfloat16=1.0)) is None
    assert bound(WORKLOADS["W1"], TINY, "16-bit", 1, Best(())) is None


def test_the_best_measurement_counts_but_no_smaller_buffer() -> None:
    best = Best((Limits("", reads={100: 9.0, 1000: 3.0}), Limits("", reads={1000: 4.0}, registers={"int8": 5.0})))
    assert (best.read_rate(1000), best.read_rate(100), best.read_rate(10**6)) == (4.0, 9.0, 9.0)
    assert (best.multiply_rate("int8"), best.multiply_rate("float32")) == (5.0, None)


def test_limits_of_this_machine(tmp_path) -> None:
    found = measure(tmp_path, 1, mebibytes=(1,), with_torch=False)
    if found.problem is None:
        assert found.reads[1 << 20] > 1e8
    assert "avx2" in flags() or not flags()
