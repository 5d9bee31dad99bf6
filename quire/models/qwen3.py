"""Qwen 3: the shared decoder with a norm on each head of q and k, before rotation."""

from quire.layers.attention import Attention
from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM, Decoder, DecoderLayer


class Qwen3Layer(DecoderLayer):
    """A layer whose attention owns q_norm and k_norm."""

    def attention(self, config: ModelConfig, index: int, *, bias: bool | None = None) -> Attention:
        attention = super().attention(config, index, bias=bias)
        attention.q_norm = self.norm(config, config.head_dim)
        attention.k_norm = self.norm(config, config.head_dim)
        return attention


class Qwen3Decoder(Decoder):
    """Layers of that kind."""

    layer = Qwen3Layer


class Model(CausalLM):
    """The causal model over it."""

    decoder = Qwen3Decoder
