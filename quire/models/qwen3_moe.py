"""Qwen 3 with a mixture of experts in all layers, or in those that the configuration names."""

from __future__ import annotations

from torch import nn

from quire.layers.linear import Linear
from quire.layers.mlp import GatedMLP
from quire.layers.moe import MixtureOfExperts
from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM, Decoder
from quire.models.qwen3 import Qwen3Layer


class Qwen3MoeLayer(Qwen3Layer):
    """Qwen 3's layer, whose feed-forward is sparse every `decoder_sparse_step` layers but for `mlp_only_layers`."""

    def feed_forward(self, config: ModelConfig, index: int) -> nn.Module:
        step, dense = config.raw.get("decoder_sparse_step", 1), config.raw.get("mlp_only_layers") or ()
        if index in dense or (index + 1) % step:
            return super().feed_forward(config, index)
        inner = config.raw["moe_intermediate_size"]
        return MixtureOfExperts(
            gate=Linear(config.hidden_size, config.num_experts),
            experts=[GatedMLP(config.hidden_size, inner, config.activation) for _ in range(config.num_experts)],
            chosen=config.num_experts_per_token,
            normalise=bool(config.raw.get("norm_topk_prob", False)),
        )


class Qwen3MoeDecoder(Decoder):
    """Layers of that kind."""

    layer = Qwen3MoeLayer


class Model(CausalLM):
    """The causal model over it."""

    decoder = Qwen3MoeDecoder
