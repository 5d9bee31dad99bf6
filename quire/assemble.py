"""From a folder to a model that runs: the passes over the module tree, in their one fixed order.

1. the family's mathematics, without memory   2. weights, as the planned type   3. frozen, ready to serve

(Quantization, tensor-parallel sharding and LoRA slots are passes between 2 and 3.)
"""

from __future__ import annotations

from pathlib import Path

import torch

from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM
from quire.models.registry import build_model
from quire.weights.load import load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def assemble(folder: Path, config: ModelConfig, dtype: str) -> CausalLM:
    """The model of `folder` with its weights as `dtype`. Raises ModelError."""
    with torch.device("meta"):
        model = build_model(config)
    load_weights(model, folder, DTYPES[dtype])
    return model.eval().requires_grad_(False)
