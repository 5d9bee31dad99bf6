"""One step's tokens as tensors: what a model's forward is given, in training and in serving alike.

Tokens of all sequences lie end to end, without padding; `starts` marks the borders. The batch knows nothing of requests,
of sampling or of how blocks are assigned.

Shapes: T tokens, S sequences, R rows whose logits are wanted, L layers, N blocks, B block size, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """Paged keys and values of every layer: `keys[l]` and `values[l]` are [N, B, K, D]. Block 0 is never read.

    scales: where the cache holds one byte per number, what a stored 1 stands for: [2, K] float32 (keys, values) of each layer.
    """

    keys: list[Tensor]
    values: list[Tensor]
    scales: list[Tensor] | None = None

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]


@dataclass(frozen=True)
class Batch:
    """The input of `model(batch)`.

    tokens, positions: [T] int64. starts: S+1 row borders (host). lengths: S context lengths, this batch included (host).
    kv: where keys and values live; None means training, where a sequence attends to this batch's own rows only.
    block_tables: [S, max blocks] int64 and slots: [T] int64 (block * B + offset that each token's key is written to); both
    None when kv is None. logit_rows: [R] int64, the rows of [0, T) whose logits the caller wants; None means all.
    adapters: [T] int32, the LoRA slot that each row goes through, -1 for the base alone; None where no row has one.
    """

    tokens: Tensor
    positions: Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    kv: KVCache | None = None
    block_tables: Tensor | None = None
    slots: Tensor | None = None
    logit_rows: Tensor | None = None
    adapters: Tensor | None = None


def packed(sequences: Sequence[Sequence[int]]) -> Batch:
    """A batch without a cache (training, scoring) of whole token sequences laid end to end."""
    starts = [0]
    for sequence in sequences:
        starts.append(starts[-1] + len(sequence))
    return Batch(
        tokens=torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64),
        positions=torch.cat([torch.arange(len(sequence)) for sequence in sequences]),
        starts=tuple(starts),
        lengths=tuple(len(sequence) for sequence in sequences),
    )
