"""How near the machine's limits are the products with packed weights, for each form, matrix and number of rows?

The matrices are those of one layer and the head of a shape. Every call takes another copy of the weight, so that nothing small
sits in a cache that a model would have emptied. Beside each: torch's own bfloat16 linear on the same matrix, and the limit: the
weight read at the machine's best rate, or the arithmetic at its best rate, whichever takes longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines import roofline
from benchmarks.engines.roofline import Best
from benchmarks.random_model import SHAPES
from benchmarks.record import Outcome
from quire import ops
from quire.ops.select import selected
from quire.ops.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, Weight
from quire.plan.hardware import probe

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
FORMS = ("bf16", "int8", "int4", "fp8")
PRODUCTS = {"bf16": "bfloat16", "int8": "int8", "int4": "int8", "fp8": "bfloat16"}
GROUP = 128
# From here on arithmetic hides where the weight comes from, and copies would only take memory.
COMPUTE_BOUND_ROWS, FEW_COPIES = 256, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b", help="whose matrices")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="numbers of rows")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="forms of the weight")
    parser.add_argument("--matrices", nargs="+", default=None, help="only these of qkv, o, gate_up, down, head")
    parser.add_argument("--mebibytes", type=int, default=768, help="of copies that calls go through")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each case")
    parser.add_argument("--threads", type=int, default=probe().cores, help="of both")


def run(options: argparse.Namespace) -> Outcome:
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as name:
        limits = [roofline.measure(Path(name), options.threads)]
        cases = []
        for matrix, outputs, inputs in shape.matrices:
            if options.matrices is None or matrix in options.matrices:
                cases += list(_matrix(matrix, outputs, inputs, options))
        limits.append(roofline.measure(Path(name), options.threads))
    best = Best(tuple(limits))
    for case in cases:
        case.update(_reached(case, best))
    print(table(cases), file=sys.stderr)
    numbers = {
        "operations": selected().__name__,
        "flags": roofline.flags(),
        "limits": [one.as_dict() for one in limits],
        "cases": cases,
    }
    return Outcome(_headline(cases), numbers)


def _matrix(matrix: str, outputs: int, inputs: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cases of one matrix, one form after the other so that only one form's copies are in memory."""
    theirs: dict[int, float] = {}
    dense = [_random("bf16", outputs, inputs).values for _ in range(_copies(2 * outputs * inputs, options.mebibytes))]
    for rows in options.rows:
        x = torch.randn(rows, inputs).to(torch.bfloat16)
        theirs[rows] = _seconds(lambda w, x=x: torch.nn.functional.linear(x, w), _some(dense, rows), options.seconds)
    del dense
    for form in options.forms:
        one = _random(form, outputs, inputs)
        size = weight_bytes(one)
        packed = [ops.pack(_random(form, outputs, inputs)) for _ in range(_copies(size, options.mebibytes))]
        for rows in options.rows:
            x = torch.randn(rows, inputs).to(torch.bfloat16)
            seconds = _seconds(lambda w, x=x: ops.packed_linear(x, w), _some(packed, rows), options.seconds)
            work = 2 * rows * outputs * inputs
            yield {
                "matrix": matrix,
                "outputs": outputs,
                "inputs": inputs,
                "form": form,
                "rows": rows,
                "microseconds": round(1e6 * seconds, 2),
                "gb_s": round(size / seconds / 1e9, 2),
                "gflop_s": round(work / seconds / 1e9, 1),
                "weight_bytes": size,
                "torch_microseconds": round(1e6 * theirs[rows], 2),
            }
        print(f"{matrix} {form} done", file=sys.stderr, flush=True)


def weight_bytes(weight: Weight) -> int:
    """Bytes of all tensors of a weight."""
    values = (getattr(weight, field.name) for field in dataclasses.fields(weight))
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _random(form: str, outputs: int, inputs: int) -> Any:
    """Speed does not depend on the numbers, so they are drawn where that is quick."""
    scales = torch.full((outputs,), 0.01)
    if form == "bf16":
        return DenseWeight(torch.empty(outputs, inputs).uniform_(-0.02, 0.02).to(torch.bfloat16))
    if form == "int8":
        return Int8Weight(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), scales)
    if form == "fp8":
        return Fp8Weight(torch.empty(outputs, inputs).uniform_(-1, 1).to(torch.float8_e4m3fn), scales)
    group = GROUP if inputs % GROUP == 0 else 32
    values = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    groups = (outputs, inputs // group)
    return Int4Weight(values, torch.full(groups, 0.01), torch.full(groups, 8, dtype=torch.uint8), group)


def _copies(size: int, mebibytes: int) -> int:
    return max(FEW_COPIES, -(-(mebibytes << 20) // size))


def _some(weights: list[Any], rows: int) -> list[Any]:
    return weights[:FEW_COPIES] if rows >= COMPUTE_BOUND_ROWS else weights


def _seconds(call: Callable[[Any], object], weights: list[Any], least: float) -> float:
    """Of one call: the median over passes through all copies, of the mean within a pass."""
    call(weights[0])
    passes: list[float] = []
    begin = time.perf_counter()
    while not passes or time.perf_counter() - begin < least:
        start = time.perf_counter()
        for weight in weights:
            call(weight)
        passes.append((time.perf_counter() - start) / len(weights))
    return statistics.median(passes)


def _reached(case: dict[str, Any], best: Best) -> dict[str, Any]:
    """The limit's time and the fraction of it, and how often torch's time ours goes into."""
    reading, multiplying = best.read_rate(4 << 30), best.multiply_rate(PRODUCTS[case["form"]])
    found: dict[str, Any] = {"torch_over_ours": round(case["torch_microseconds"] / case["microseconds"], 4)}
    if reading and multiplying:
        work = 2 * case["rows"] * case["outputs"] * case["inputs"]
        least = max(case["weight_bytes"] / reading, work / multiplying)
        found |= {"limit_microseconds": round(1e6 * least, 2), "of_limit": round(1e6 * least / case["microseconds"], 3)}
    return found


def table(cases: list[dict[str, Any]]) -> str:
    """Lines for a terminal."""
    lines = [f"{'matrix':8} {'form':5} {'rows':>5} {'us':>10} {'GB/s':>7} {'GFLOP/s':>8} {'of limit':>8} {'torch / ours':>12}"]
    for case in cases:
        reached = f"{100 * case['of_limit']:.0f} %" if "of_limit" in case else "-"
        lines.append(
            f"{case['matrix']:8} {case['form']:5} {case['rows']:>5} {case['microseconds']:>10.1f} {case['gb_s']:>7.1f} "
            f"{case['gflop_s']:>8.0f} {reached:>8} {case['torch_over_ours']:>12.2f}"
        )
    return "\n".join(lines)


def _headline(cases: list[dict[str, Any]]) -> str:
    """Of each form: the range of fractions at few rows and at many."""
    parts = []
    for form in dict.fromkeys(case["form"] for case in cases):
        of = [case for case in cases if case["form"] == form and "of_limit" in case]
        few = [case["of_limit"] for case in of if case["rows"] <= 32]
        many = [case["of_limit"] for case in of if case["rows"] >= COMPUTE_BOUND_ROWS]
        ranges = [
            f"{100 * min(found):.0f}-{100 * max(found):.0f} % at {words}"
            for found, words in ((few, "up to 32 rows"), (many, f"{COMPUTE_BOUND_ROWS} and more"))
            if found
        ]
        parts.append(f"{form} {', '.join(ranges) or 'without limits'}")
    return f"{selected().__name__.rpartition('.')[2]} products, of the machine's limit: {'; '.join(parts)}"
