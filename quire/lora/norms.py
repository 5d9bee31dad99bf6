"""The norms by which DoRA divides (Liu et al. 2024): of the rows of W + s B A, or of an embedding's columns.

Training and serving compute them here, from the same tensors by the same steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.lora.base import pieces
from quire.lora.parts import ModulePart
from quire.models.decoder import CausalLM


@torch.no_grad()
def weight_norms(model: CausalLM, module: Linear | Embedding, part: ModulePart) -> Tensor:
    """[O]: the norm of what each output is made of, base and adapter together."""
    a, b = part.a.detach(), part.b.detach()
    if isinstance(module, Embedding):
        squares = torch.zeros(b.shape[1], device=b.device)
        for start, rows in pieces(model, module):
            squares += (rows + part.scale * (a[:, start : start + len(rows)].t() @ b)).square().sum(0)
        return squares.sqrt()
    norms = [
        torch.linalg.norm(rows + part.scale * (b[:, start : start + len(rows)].t() @ a), dim=1)
        for start, rows in pieces(model, module)
    ]
    return torch.cat(norms)
