"""Mixtral (Jiang et al. 2024): Llama whose feed-forward layer is a mixture of experts, under names of its own."""

from __future__ import annotations

from torch import Tensor, nn

from quire import ops
from quire.batch import Batch
from quire.layers.attention import Rotation
from quire.layers.linear import Linear, products
from quire.layers.moe import MixtureOfExperts
from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM, Decoder, DecoderLayer


class Expert(nn.Module):
    """w2(activation(w1(x)) * w3(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.hidden_size, config.intermediate_size)
        self.w2 = Linear(config.intermediate_size, config.hidden_size)
        self.w3 = Linear(config.hidden_size, config.intermediate_size)
        self.activation = config.activation

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        gate, up = products(x, adapters, self.w1, self.w3)
        return self.w2(ops.gated_activation(gate, up, self.activation), adapters)


class MixtralLayer(DecoderLayer):
    """The shared layer with `block_sparse_moe` in the place of `mlp`."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.block_sparse_moe = MixtureOfExperts(
            gate=Linear(config.hidden_size, config.num_experts),
            experts=[Expert(config) for _ in range(config.num_experts)],
            chosen=config.num_experts_per_token,
            normalise=True,
        )

    def feed_forward(self, config: ModelConfig, index: int) -> None:
        """No `mlp` here."""

    def forward(self, x: Tensor, rotation: Rotation | None, batch: Batch) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, batch.adapters), rotation, batch)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x, batch.adapters), batch.adapters)


class MixtralDecoder(Decoder):
    """Layers of that kind."""

    layer = MixtralLayer


class Model(CausalLM):
    """The causal model over it."""

    decoder = MixtralDecoder
