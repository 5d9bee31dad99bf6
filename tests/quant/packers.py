"""Writers of the published layouts, number by number from the formats' definitions; nothing of quire/quant is used.

Letters: O outputs, I inputs, G groups. numbers int [O, I] 0 to 15, zeros int [O, G], scales [O, G], of_input[i]: the group of
input i.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def word(numbers: list[int]) -> int:
    """Eight numbers in an int32, the first in the lowest four bits."""
    value = 0
    for place, number in enumerate(numbers):
        value |= int(number) << (4 * place)
    return value - (1 << 32) if value >= 1 << 31 else value


def words_along_rows(matrix: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[A, B] -> int32 [A, B / 8]; place i of a word holds the order[i]-th of its eight."""
    rows = [[word([row[start + o] for o in order]) for start in range(0, len(row), 8)] for row in matrix.tolist()]
    return torch.tensor(rows, dtype=torch.int32)


def awq(numbers: np.ndarray, zeros: np.ndarray, scales: np.ndarray, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return {
        "qweight": words_along_rows(numbers.T, AWQ_ORDER),
        "qzeros": words_along_rows(zeros.T, AWQ_ORDER),
        "scales": torch.tensor(scales.T.copy()).to(dtype),
    }


def gptq(
    numbers: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    of_input: np.ndarray,
    dtype: torch.dtype = torch.float16,
    *,
    version: int = 1,
) -> dict[str, Tensor]:
    return {
        "qweight": words_along_rows(numbers).t().contiguous(),
        "qzeros": words_along_rows((zeros.T - (version == 1)) % 16),
        "scales": torch.tensor(scales.T.copy()).to(dtype),
        "g_idx": torch.tensor(of_input, dtype=torch.int32),
    }


def pack_quantized(
    numbers: np.ndarray, zeros: np.ndarray | None, scales: np.ndarray, of_input: np.ndarray | None = None
) -> dict[str, Tensor]:
    """compressed-tensors keeps signed numbers plus 8, which is what `numbers` and `zeros` are already."""
    parts = {
        "weight_packed": words_along_rows(numbers),
        "weight_scale": torch.tensor(scales).to(torch.bfloat16),
        "weight_shape": torch.tensor(numbers.shape),
    }
    if zeros is not None:
        parts["weight_zero_point"] = words_along_rows(zeros.T).t().contiguous()
    if of_input is not None:
        parts["weight_g_idx"] = torch.tensor(of_input, dtype=torch.int32)
    return parts


def dense(numbers: np.ndarray, zeros: np.ndarray, scales: Tensor | np.ndarray, of_input: np.ndarray) -> Tensor:
    """What such a weight stands for [O, I], float32."""
    scales = torch.as_tensor(scales).float()
    return (torch.tensor(numbers) - torch.tensor(zeros)[:, of_input]).float() * scales[:, of_input]


def natural(inputs: int, size: int) -> np.ndarray:
    """The group of each input where groups lie one after the other."""
    return np.arange(inputs) // size


def random_weight(outputs: int, inputs: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """numbers, zeros and scales (that float16 and bfloat16 hold exactly), each value of each range among them."""
    rng = np.random.default_rng(seed)
    groups = inputs // size
    scales = rng.integers(1, 127, (outputs, groups)) / 2.0**12
    return rng.integers(0, 16, (outputs, inputs)), rng.integers(0, 16, (outputs, groups)), scales.astype(np.float32)
