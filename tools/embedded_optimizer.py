"""How the weights move: orthogonalised momentum for matrices, Adam for the rest, and a rate that follows the clock.

Muon (Jordan et al. 2024) is known to get more out of each token than Adam, and tokens are what one hour on two cores
is short of. All state lies in shared memory and each parameter has one owner, so that several processes can share the
work. The schedule is a list of anchors: the clock decides where they lie while a run is made, and the recorded anchors
alone decide when it is repeated. Knows no data, and of the model only its parameters' names and shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MOMENTUM, DECAY = 0.95, 0.01
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.95), 1e-8


def orthogonalized(matrices: Tensor) -> Tensor:
    """[N, rows, columns] -> roughly U V^T of each one's singular value decomposition, by five matrix polynomials."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Optimizer:
    """Muon for the matrices inside the layers; Adam for the (tied) embedding and the norms.

    `update(rank, ...)` moves the parameters that this rank owns and no other.
    """

    def __init__(self, model: nn.Module, matrix_rate: float, other_rate: float, ranks: int) -> None:
        self.matrix_rate, self.other_rate = matrix_rate, other_rate
        named = dict(model.named_parameters())
        self.matrices = {name: p for name, p in named.items() if p.ndim == 2 and "layers." in name}
        self.others = {name: p for name, p in named.items() if name not in self.matrices}
        self.owner = {name: index % ranks for index, name in enumerate(self.others)}
        for index, name in enumerate(sorted(self.matrices, key=lambda name: (self.matrices[name].shape, name))):
            self.owner[name] = index % ranks
        self.state = {name: torch.zeros_like(p.data).share_memory_() for name, p in named.items()}
        self.state |= {name + "/square": torch.zeros_like(p.data).share_memory_() for name, p in self.others.items()}

    @torch.no_grad()
    def update(self, rank: int, gradients: dict[str, Tensor], step: int, factor: float) -> None:
        self._move_matrices(
            [name for name in self.matrices if self.owner[name] == rank], gradients, self.matrix_rate * factor
        )
        for name, parameter in self.others.items():
            if self.owner[name] == rank:
                self._move_other(name, parameter, gradients[name], step, self.other_rate * factor)

    def _move_matrices(self, names: list[str], gradients: dict[str, Tensor], rate: float) -> None:
        by_shape: dict[torch.Size, list[str]] = {}
        for name in names:
            by_shape.setdefault(self.matrices[name].shape, []).append(name)
        for shape, alike in by_shape.items():
            directions = []
            for name in alike:
                momentum = self.state[name].lerp_(gradients[name], 1 - MOMENTUM)
                directions.append(gradients[name].lerp(momentum, MOMENTUM))
            size = rate * math.sqrt(max(1.0, shape[0] / shape[1]))
            for name, direction in zip(alike, orthogonalized(torch.stack(directions)), strict=True):
                self.matrices[name].mul_(1 - rate * DECAY).add_(direction, alpha=-size)

    def _move_other(self, name: str, parameter: nn.Parameter, gradient: Tensor, step: int, rate: float) -> None:
        (low, high), count = ADAM_BETAS, step + 1
        mean = self.state[name].lerp_(gradient, 1 - low)
        square = self.state[name + "/square"].mul_(high).addcmul_(gradient, gradient, value=1 - high)
        scale = square.div(1 - high**count).sqrt_().add_(ADAM_EPSILON)
        parameter.addcdiv_(mean, scale, value=-rate / (1 - low**count))


@dataclass
class Schedule:
    """Factor of the learning rate by step: warm-up, a plateau, then a straight line to zero.

    anchors: (step, factor) pairs between which the factor is linear. While a run is made the last anchors move with the
    measured speed, so that the line meets zero when the minutes are over; those already passed never move.
    """

    warmup: int = 40
    plateau_share: float = 0.35
    anchors: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.anchors = [(int(step), float(factor)) for step, factor in self.anchors] or [(0, 0.0), (self.warmup, 1.0)]

    def factor(self, step: int) -> float:
        place = step + 1
        for (left, low), (right, high) in zip(self.anchors, self.anchors[1:], strict=False):
            if place <= right:
                return low + (high - low) * (place - left) / (right - left)
        return self.anchors[-1][1]

    def finished(self, step: int) -> bool:
        return self.anchors[-1][1] == 0.0 and step >= self.anchors[-1][0]

    def follow_clock(self, step: int, share_of_time: float, seconds_left: float, seconds_per_step: float) -> None:
        """Place the end where this speed will have used up the time; called now and then."""
        if share_of_time < self.plateau_share or step < self.warmup:
            return
        now = self.factor(step - 1)
        end = step + max(1, int(seconds_left / seconds_per_step))
        self.anchors = [*(anchor for anchor in self.anchors if anchor[0] < step), (step, now), (end, 0.0)]
