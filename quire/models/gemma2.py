"""Gemma 2 (Gemma Team 2024): scaled embeddings, (1 + w) norms before and after each part, soft caps on scores and logits.

Every other layer looks through a window, which is data (`config.layer_windows`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire import ops
from quire.batch import Batch
from quire.layers.attention import Attention, Rotation
from quire.layers.norm import RMSNorm
from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM, Decoder, DecoderLayer, softcapped


class Gemma2Layer(DecoderLayer):
    """A layer that also norms what it adds."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.pre_feedforward_layernorm = self.norm(config, config.hidden_size)
        self.post_feedforward_layernorm = self.norm(config, config.hidden_size)

    def norm(self, config: ModelConfig, size: int) -> nn.Module:
        return RMSNorm(size, config.norm_eps, offset=1.0)

    def attention(self, config: ModelConfig, index: int, *, bias: bool | None = None) -> Attention:
        attention = super().attention(config, index, bias=bias)
        attention.scale = config.raw["query_pre_attn_scalar"] ** -0.5
        attention.softcap = config.raw.get("attn_logit_softcapping")
        return attention

    def forward(self, x: Tensor, rotation: Rotation | None, batch: Batch) -> Tensor:
        adapters = batch.adapters
        attended = self.self_attn(self.input_layernorm(x, adapters), rotation, batch)
        x = ops.add(x, self.post_attention_layernorm(attended, adapters))
        widened = self.mlp(self.pre_feedforward_layernorm(x, adapters), adapters)
        return ops.add(x, self.post_feedforward_layernorm(widened, adapters))


class Gemma2Decoder(Decoder):
    """Embeddings times sqrt(E)."""

    layer = Gemma2Layer

    def embed(self, batch: Batch) -> Tensor:
        x = super().embed(batch)
        # Rounded to the model's type first, as Gemma was trained: sqrt(3072) is 55.5 in bfloat16.
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)


class Model(CausalLM):
    """The causal model over it."""

    decoder = Gemma2Decoder

    def logits(self, hidden: Tensor, adapters: Tensor | None = None) -> Tensor:
        return softcapped(super().logits(hidden, adapters), self.config.raw.get("final_logit_softcapping"))
