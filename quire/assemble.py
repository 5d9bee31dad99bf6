"""From a folder to a model that runs: the passes over the module tree, in their one fixed order.

1. the family's mathematics, without memory   2. weights, as the planned type, and with them, tensor by tensor,
3. the linears' formats: quantized in the files, quantized at load, or packed dense   4. frozen, ready to serve

(Tensor-parallel sharding and LoRA slots are passes between 3 and 4.)
"""

from __future__ import annotations

from pathlib import Path

import torch

from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM
from quire.models.registry import build_model
from quire.quant.packing import Packing
from quire.quant.scheme import scheme_of
from quire.weights.load import load_weights
from quire.weights.packed_cache import PackedCache
from quire.weights.packed_model import keep, restore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def assemble(
    folder: Path,
    config: ModelConfig,
    dtype: str,
    quantization: str | None = None,
    *,
    keep_dense: bool = False,
    cache: PackedCache | None = None,
) -> CausalLM:
    """The model of `folder` with its weights as `dtype`. Raises ModelError, ConfigError for a wish that the files contradict.

    quantization: as in EngineConfig. keep_dense: dense weights stay parameters even where the operations would pack them.
    cache: where packed weights are kept from start to start.
    """
    scheme = scheme_of(config.raw, quantization)
    with torch.device("meta"):
        model = build_model(config)
    packing = Packing(model, scheme, DTYPES[dtype], keep_dense=keep_dense)
    if cache is None or not restore(model, packing, cache):
        load_weights(model, folder, DTYPES[dtype], packing)
        if cache is not None:
            keep(model, cache)
    return model.eval().requires_grad_(False)
