"""What do adapters' products and the gradients of training cost, beside torch's way and the machine's float32 arithmetic?

One layer's operations of a shape, in bfloat16: the products of adapters (some rows over some adapters, as serving has them,
and many rows of one, as training has), and backward passes beside what torch derives for the reference's formulas. `of limit`
counts a multiplication and an addition each as an operation, at the machine's best float32 rate; norms and activations are
bound by memory and by their functions, and have none.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines import roofline
from benchmarks.engines.roofline import Best
from benchmarks.random_model import SHAPES, Shape
from benchmarks.record import Outcome
from quire.ops import autograd, cpu, plain, reference
from quire.ops.weights import DenseWeight, LoraTable, LoraWeight
from quire.plan.hardware import probe

DTYPE = torch.bfloat16
FEW = ((1, 1), (8, 8), (32, 8))


@dataclass(frozen=True)
class Case:
    """operations: 0 where there is no limit by arithmetic."""

    kernel: str
    rows: int
    operations: float
    ours: Callable[[], object]
    theirs: Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b", help="whose layer")
    parser.add_argument("--rows", type=int, default=1024, help="of a training step, in sequences of at most 512")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case")
    parser.add_argument("--threads", type=int, default=probe().cores, help="of both")


def run(options: argparse.Namespace) -> Outcome:
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as name:
        limits = roofline.measure(Path(name), options.threads)
    rate = Best((limits,)).multiply_rate("float32")
    found = []
    for case in [*_adapters(shape, options.rank, options.rows), *_gradients(shape, options.rows)]:
        ours, theirs = _seconds(case.ours, options.seconds), _seconds(case.theirs, options.seconds)
        one: dict[str, Any] = {"kernel": case.kernel, "rows": case.rows, "microseconds": round(1e6 * ours, 1)}
        one |= {"torch_microseconds": round(1e6 * theirs, 1), "torch_over_ours": round(theirs / ours, 2)}
        if case.operations:
            one["gflop_s"] = round(case.operations / ours / 1e9, 1)
            if rate:
                one["of_limit"] = round(case.operations / ours / rate, 3)
        found.append(one)
        print(one, file=sys.stderr, flush=True)
    return Outcome(_headline(found), {"limits": [limits.as_dict()], "cases": found})


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DTYPE)


def _adapters(shape: Shape, rank: int, many: int) -> Iterator[Case]:
    inputs, outputs = shape.hidden, shape.intermediate
    for rows, count in (*FEW, (many, 1)):
        parts = [LoraWeight(torch.randn(rank, inputs), torch.randn(rank, outputs), 1.0) for _ in range(count)]
        slots = torch.arange(rows, dtype=torch.int32) % count
        x, y = _random(rows, inputs), _random(rows, outputs)
        table, plainly = cpu.lora_table(parts), LoraTable(tuple(parts))
        work = 2.0 * rows * rank * (inputs + outputs)
        yield Case(
            f"lora, adapters: {count}",
            rows,
            work,
            lambda x=x, y=y, slots=slots, table=table: cpu.lora(x, y, slots, table),
            lambda x=x, y=y, slots=slots, table=plainly: reference.lora(x, y, slots, table),
        )
    need = [True, True]
    yield Case(
        "lora, backward",
        rows,
        3 * work,
        lambda: cpu.lora_backward(y, x, slots, table, True, need),
        lambda: reference.lora_backward(y, x, slots, plainly, True, need),
    )


def _gradients(shape: Shape, rows: int) -> Iterator[Case]:
    hidden, inner = shape.hidden, shape.intermediate
    for outputs, inputs in ((inner, hidden), (hidden, inner)):
        weight, dy = _random(outputs, inputs), _random(rows, outputs)
        packed = cpu.pack(DenseWeight(weight))
        yield Case(
            f"dx of {inputs} -> {outputs}",
            rows,
            2.0 * rows * outputs * inputs,
            lambda dy=dy, packed=packed: cpu.packed_linears_backward([dy], [packed], DTYPE),
            lambda dy=dy, weight=weight: dy @ weight,
        )
    size, starts = hidden // shape.heads, (*range(0, rows, 512), rows)
    q, dy = _random(rows, shape.heads, size), _random(rows, shape.heads, size)
    k, v = _random(rows, shape.kv_heads, size), _random(rows, shape.kv_heads, size)
    # Seven products over half of each square: two of them are computed twice.
    pairs = sum((end - start) ** 2 / 2 for start, end in itertools.pairwise(starts))
    options = size**-0.5, None, None
    yield Case(
        "attention, backward",
        rows,
        7 * 2.0 * pairs * shape.heads * size,
        lambda: cpu.packed_attention_backward(dy, q, k, v, starts, *options),
        lambda: autograd._recomputed(dy, q, k, v, starts, *options),
    )
    x, norm, gate, up = _random(rows, hidden), _random(hidden), _random(rows, inner), _random(rows, inner)
    for name, function, tensors in (
        ("rms_norm, both ways", lambda ops, x: ops.rms_norm(x, norm, 1e-6, 0.0), (x,)),
        ("silu and product, both ways", lambda ops, gate, up: ops.gated_activation(gate, up, "silu"), (gate, up)),
    ):
        ours, theirs = (_both_ways(function, ops, tensors) for ops in (cpu, plain))
        yield Case(name, rows, 0, ours, theirs)


def _both_ways(function: Callable[..., Tensor], ops: Any, tensors: Sequence[Tensor]) -> Callable[[], object]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    dy = _random(*tensors[0].shape)
    return lambda: torch.autograd.grad(function(ops, *leaves), leaves, dy)


def _seconds(call: Callable[[], object], least: float) -> float:
    """Of one call: the median."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < least:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _headline(cases: list[dict[str, Any]]) -> str:
    parts = [f"{case['kernel']} of {case['rows']} rows {case['torch_over_ours']}" for case in cases]
    return f"torch's time over ours: {'; '.join(parts)}"
