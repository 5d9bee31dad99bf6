"""Phi-3 and Phi-4-mini (Abdin et al. 2024): Llama with q, k, v in one matrix, and gate and up in another.

LongRoPE and partial rotation are data (`config.layer_ropes`).
"""

from __future__ import annotations

from torch import Tensor, nn

from quire import ops
from quire.batch import Batch
from quire.layers.attention import Rotation, attend
from quire.layers.linear import Linear
from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM, Decoder, DecoderLayer


class Phi3Attention(nn.Module):
    """Attention with one projection; its rows are the heads of q, then of k, then of v."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = index, config.head_dim, config.layer_windows[index]
        self.split = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.qkv_proj = Linear(config.hidden_size, sum(self.split) * config.head_dim)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size)

    def forward(self, x: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        q, k, v = self.qkv_proj(x, batch.adapters).unflatten(1, (-1, self.head_dim)).split(self.split, dim=1)
        out = attend(q, k, v, batch, self.layer, rotation=rotation, scale=self.head_dim**-0.5, window=self.window)
        return self.o_proj(out.flatten(1), batch.adapters)


class Phi3MLP(nn.Module):
    """down(activation(gate) * up), where the first half of one product is the gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.activation = config.activation

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        gate, up = self.gate_up_proj(x, adapters).chunk(2, dim=1)
        return self.down_proj(ops.gated_activation(gate, up, self.activation), adapters)


class Phi3Layer(DecoderLayer):
    """The shared layer with both."""

    def attention(self, config: ModelConfig, index: int) -> nn.Module:
        return Phi3Attention(config, index)

    def feed_forward(self, config: ModelConfig, index: int) -> nn.Module:
        return Phi3MLP(config)


class Phi3Decoder(Decoder):
    """Layers of that kind."""

    layer = Phi3Layer


class Model(CausalLM):
    """The causal model over it."""

    decoder = Phi3Decoder
