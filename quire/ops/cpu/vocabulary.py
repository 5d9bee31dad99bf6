"""Rows of logits by the native kernels (csrc/loss.cpp, csrc/sampling.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.cpu.gradients import as_rows
from quire.ops.cpu.library import TYPES, call


def peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits, rows, stride = as_rows(logits)
    found, ids = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)
    row = TYPES[logits.dtype], rows, logits.shape[1], logits.data_ptr(), stride
    call("peaks", *row, found.data_ptr(), ids.data_ptr())
    return found, ids


def masses(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits, rows, stride = as_rows(logits)
    found, sums = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)
    row = TYPES[logits.dtype], rows, logits.shape[1], logits.data_ptr(), stride
    call("masses", *row, found.data_ptr(), sums.data_ptr())
    return found, sums


def cross_entropy(logits: Tensor, targets: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    if slope is None:
        return masses(logits)
    logits, rows, stride = as_rows(logits)
    targets = targets.contiguous()
    assert slope.shape == logits.shape
    assert slope.dtype == logits.dtype
    assert slope.stride(1) == 1 or slope.shape[1] == 1
    found, sums = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)
    row = TYPES[logits.dtype], rows, logits.shape[1], logits.data_ptr(), stride
    out = found.data_ptr(), sums.data_ptr(), slope.data_ptr(), slope.stride(0)
    call("cross_entropy", *row, targets.data_ptr(), *out)
    return found, sums


def draw(logits: Tensor, temperatures: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    logits, rows, stride = as_rows(logits)
    rules = [x.contiguous() for x in (temperatures, min_p, top_k, top_p, uniforms)]
    assert all(len(x) == rows for x in rules)
    assert [x.dtype for x in rules] == [torch.int64 if x is rules[2] else torch.float64 for x in rules]
    assert logits.dtype == torch.float32
    tokens = torch.empty(rows, dtype=torch.int64)
    call("draw", rows, logits.shape[1], logits.data_ptr(), stride, *(x.data_ptr() for x in rules), tokens.data_ptr())
    return tokens
