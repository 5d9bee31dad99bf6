"""The rate that the machine's limits allow for a workload: the work that no engine can leave out, at the measured limits.

Weights are read once a step, keys and values of a sequence once for each of its tokens; prompts are arithmetic. A prefix that
requests share is computed once. Nothing else is counted, so 100 % is out of reach.
"""

from __future__ import annotations

from benchmarks.engines.roofline import Best
from benchmarks.engines.workloads import Workload
from benchmarks.random_model import Shape

# The kind of product that the best kernel for weights of a form uses.
PRODUCTS = {"16-bit": "bfloat16", "8-bit": "int8", "4-bit": "int8"}


def bound(workload: Workload, shape: Shape, form: str, weight_bytes: float, limits: Best) -> float | None:
    """Tokens a second, in the workload's own unit; None where a limit was not measured."""
    reading, multiplying = limits.read_rate(weight_bytes), limits.multiply_rate(PRODUCTS[form])
    if reading is None or multiplying is None:
        return None
    if workload.count == 1 and workload.output > 1:
        steps = workload.output - 1
        return steps / _decoding(workload, shape, weight_bytes, reading, multiplying)
    seconds = _prompts(workload, shape, weight_bytes, reading, multiplying)
    seconds += _decoding(workload, shape, weight_bytes, reading, multiplying)
    return workload.tokens() / seconds


def _prompts(workload: Workload, shape: Shape, weight_bytes: float, reading: float, multiplying: float) -> float:
    own, shared = workload.prompt, workload.shared
    attended = shared * (shared + 1) // 2 + workload.count * (own * shared + own * (own + 1) // 2)
    work = shape.work(workload.computed_prompt(), workload.count, attended)
    return max(weight_bytes / reading, work / multiplying)


def _decoding(workload: Workload, shape: Shape, weight_bytes: float, reading: float, multiplying: float) -> float:
    """Seconds of all steps after the one that gave the first token."""
    first = workload.shared + workload.prompt + 1
    seconds = 0.0
    for length in range(first, first + workload.output - 1):
        # A common prefix's keys and values serve all sequences with one reading.
        cached = workload.shared + workload.count * (length - workload.shared)
        read = weight_bytes + cached * shape.kv_bytes
        seconds += max(read / reading, shape.work(workload.count, workload.count, workload.count * length) / multiplying)
    return seconds
