"""Matrix products whose rows do not depend on how many rows there are.

A BLAS picks its kernel, and with it the order of summation, by the number of rows. So a product here only ever has 1, 16,
64 or 256 rows (the last group is padded), and a size other than 16 is used only after a trial on this machine, with the
very shape and type at hand, gave the same bits as groups of 16 (on data made to tell: see `trial.py`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quire.ops.reference.trial import cancelling

GROUP = 16
OTHER_SIZES = (256, 64, 1)
# Above this many weights (the vocabulary) a trial would cost more than it wins.
MOST_WEIGHTS_TO_TRY = 1 << 26


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    outputs, inputs = weight.shape
    rows = x.shape[0]
    out = x.new_empty(rows, outputs)
    transposed = weight.t()
    sizes = group_sizes(inputs, outputs, x.dtype, torch.get_num_threads())
    done = 0
    while done < rows:
        left = rows - done
        size = next((size for size in sizes if size <= left and (size > 1 or left == 1)), 0)
        if size:
            torch.mm(x[done : done + size], transposed, out=out[done : done + size])
        else:
            size = min(left, GROUP)
            padded = x.new_zeros(GROUP, inputs)
            padded[:size] = x[done : done + size]
            out[done : done + size] = torch.mm(padded, transposed)[:size]
        done += size
    return out if bias is None else out.add_(bias)


@functools.cache
def group_sizes(inputs: int, outputs: int, dtype: torch.dtype, threads: int) -> tuple[int, ...]:
    """The row counts, largest first, whose products agree bit for bit with those of 16 rows for this shape."""
    del threads  # part of the key: a BLAS may split its work by it
    if inputs * outputs > MOST_WEIGHTS_TO_TRY:
        return (GROUP,)
    x, right = cancelling(max(OTHER_SIZES), inputs, outputs, dtype)
    transposed = right.t().contiguous().t()  # laid out as a weight [O, I] is
    expected = torch.cat([torch.mm(group, transposed) for group in x.split(GROUP)])
    agreeing = [
        size
        for size in OTHER_SIZES
        if all(
            torch.equal(torch.mm(x[start : start + size], transposed), expected[start : start + size])
            for start in range(0, min(len(x), 16 * size), size)
        )
    ]
    return tuple(sorted([*agreeing, GROUP], reverse=True))
