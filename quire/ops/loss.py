"""Cross-entropy over a vocabulary without the logits of all rows: chunks of rows, each chunk's gradient made while its logits
are there.

Logits come from the same products that serve, and log-probabilities from the same float32 `log_softmax`, so that those of a
training step are those of a request, bit for bit. Knows no model.

Letters: R rows, E width, V vocabulary.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quire.ops.weights import DenseWeight

# Logits of a chunk: 64 MiB in float32, and up to three times that while its gradient is made.
CHUNK_ELEMENTS = 1 << 24
MOST_ROWS, LEAST_ROWS = 1024, 16


def chunk_rows(vocabulary: int) -> int:
    """Rows whose logits are in memory at once."""
    return max(LEAST_ROWS, min(MOST_ROWS, CHUNK_ELEMENTS // vocabulary))


class Head:
    """A dense tensor or a packed weight [V, E], and what comes after its product."""

    def __init__(self, kernels: ModuleType, weight: Any, bias: Tensor | None, softcap: float | None) -> None:
        self.kernels, self.bias, self.softcap = kernels, bias, softcap
        self.vocabulary = weight.shape[0]
        self.dense, self.packed = None, weight
        if isinstance(weight, Tensor):
            self.dense = weight.detach()
            self.packed = kernels.pack(DenseWeight(self.dense)) if getattr(kernels, "PACKS_DENSE", False) else None

    def logits(self, rows: Tensor) -> Tensor:
        """[R, V] in float32, as a model gives them."""
        if self.packed is None:
            logits = self.kernels.linear(rows, self.dense, self.bias).float()
        else:
            logits = self.kernels.packed_linear(rows, self.packed, self.bias).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def gradient_of_product(self, grad: Tensor, logits: Tensor) -> Tensor:
        """That of what was softly capped, in the memory of the logits' gradient."""
        return grad if self.softcap is None else grad.mul_(1 - (logits / self.softcap).square_())

    def gradient_of_rows(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        if self.packed is None:
            return (grad @ self.dense.float()).to(dtype)
        return self.kernels.packed_linears_backward([grad], [self.packed], dtype)


class HeadLoss(torch.autograd.Function):
    """-sum of weights * log-probabilities; the gradients of hidden and of a dense head are made on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, head: Head, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if need_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        size = chunk_rows(head.vocabulary)
        for begin in range(0, len(hidden), size):
            part = slice(begin, begin + size)
            rows, wanted, share = hidden[part], targets[part, None], weights[part].float()
            logits = head.logits(rows)
            table = torch.log_softmax(logits, dim=-1)
            logprobs[part] = table.gather(1, wanted)[:, 0]
            loss -= (logprobs[part].double() * share.double()).sum()
            if need_hidden or need_weight:
                grad = table.exp_().mul_(share[:, None]).scatter_add_(1, wanted, -share[:, None])
                grad = head.gradient_of_product(grad, logits)
                if need_hidden:
                    of_hidden[part] = head.gradient_of_rows(grad, hidden.dtype)
                if need_weight:
                    of_weight.addmm_(grad.t(), rows.float())
        ctx.gradients = of_hidden, None if of_weight is None else of_weight.to(weight.dtype)
        ctx.mark_non_differentiable(logprobs)
        return loss.float(), logprobs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = (None if one is None else (one * grad).to(one.dtype) for one in ctx.gradients)
        return of_hidden, of_weight, None, None, None


def head_loss(
    kernels: ModuleType,
    hidden: Tensor,
    head: Any,
    targets: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    dense = head if isinstance(head, Tensor) else None
    return HeadLoss.apply(hidden, dense, Head(kernels, head, bias, softcap), targets, weights)
