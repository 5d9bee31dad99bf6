"""Where the scales of a cache of one byte per number come from: the checkpoint, 1, or a calibration at start."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quire.assemble import DTYPES
from quire.config import AUTO, EngineConfig
from quire.engine.calibration import calibration_tokens, observed_bounds, scales_of
from quire.engine.kv import KV_DTYPES
from quire.log import logger
from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM
from quire.plan.memory import Plan
from quire.text.tokenizer import Tokenizer
from quire.weights.kv_scales import names_kv_scales, stored_kv_scales

log = logger(__name__)


def kv_scales(
    config: EngineConfig, plan: Plan, model: CausalLM, folder: Path, shape: ModelConfig, tokenizer: Tokenizer
) -> list[Tensor] | None:
    """[2, K] float32 for each layer; None for a cache that holds full numbers. Raises ModelError for damaged stored ones."""
    kind = plan.kv_cache_dtype
    if config.kv_cache_dtype == AUTO:
        if names_kv_scales(shape.raw):
            log.info("The checkpoint names scales for an FP8 KV cache; --kv-cache-dtype fp8 uses them")
        return None
    if not config.calculate_kv_scales and kind != "int8":
        stored = stored_kv_scales(folder, shape)
        if stored is not None:
            log.info("KV cache in %s with the checkpoint's scales", kind)
            return stored
        log.info("KV cache in %s with scales of 1; --calculate-kv-scales finds them at start", kind)
        return [torch.ones(2, shape.num_kv_heads) for _ in range(shape.num_layers)]
    sequences = calibration_tokens(tokenizer, shape)
    bounds = observed_bounds(model, sequences, DTYPES[plan.dtype], plan.max_num_batched_tokens)
    scales = scales_of(bounds, KV_DTYPES[kind])
    keys, values = ([float(scale[row].max()) for scale in scales] for row in (0, 1))
    log.info(
        "KV cache in %s with scales found over %d tokens: keys up to %.3g, values up to %.3g",
        *(kind, sum(map(len, sequences)), max(keys), max(values)),
    )
    return scales
