"""Qwen 2 and 2.5: the shared decoder with a bias on q, k and v."""

from quire.layers.attention import Attention
from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM, Decoder, DecoderLayer


class Qwen2Layer(DecoderLayer):
    """A layer whose q, k and v have a bias, and whose output has none."""

    def attention(self, config: ModelConfig, index: int, *, bias: bool | None = True) -> Attention:
        return super().attention(config, index, bias=bias)


class Qwen2Decoder(Decoder):
    """Layers of that kind."""

    layer = Qwen2Layer


class Model(CausalLM):
    """The causal model over it."""

    decoder = Qwen2Decoder
