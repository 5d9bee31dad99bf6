"""OPT (Zhang et al. 2022): learned positions, LayerNorm, a plain feed-forward layer and biases everywhere.

opt-350m alone puts its norms after the residual sums (`do_layer_norm_before` false) and projects embeddings that are
narrower than the layers (`word_embed_proj_dim`).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from quire import ops
from quire.batch import Batch
from quire.layers.attention import attend
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear, products
from quire.layers.norm import LayerNorm
from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM, LayerStep, layer_step, run

# The position table begins with two rows for padding, from OPT's training code (fairseq).
POSITION_OFFSET = 2


def _norm(config: ModelConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.norm_eps, affine=config.raw.get("layer_norm_elementwise_affine", True))


class OPTAttention(nn.Module):
    """Multi-head attention without rotation."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.layer, self.head_dim = index, config.head_dim
        width, bias = config.hidden_size, config.raw.get("enable_bias", True)
        self.q_proj = Linear(width, width, bias)
        self.k_proj = Linear(width, width, bias)
        self.v_proj = Linear(width, width, bias)
        self.out_proj = Linear(width, width, bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        together = products(x, batch.adapters, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.unflatten(1, (-1, self.head_dim)) for y in together)
        return self.out_proj(attend(q, k, v, batch, self.layer, scale=self.head_dim**-0.5).flatten(1), batch.adapters)


class OPTLayer(nn.Module):
    """Attention and feed-forward, each with its norm before it or after the sum."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        bias = config.raw.get("enable_bias", True)
        self.norm_first = config.raw.get("do_layer_norm_before", True)
        self.activation = config.activation
        self.self_attn = OPTAttention(config, index)
        self.self_attn_layer_norm = _norm(config)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias)
        self.final_layer_norm = _norm(config)

    def feed_forward(self, x: Tensor, adapters: Tensor | None) -> Tensor:
        return self.fc2(ops.activation(self.fc1(x, adapters), self.activation), adapters)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        adapters = batch.adapters
        if self.norm_first:
            x = ops.add(x, self.self_attn(self.self_attn_layer_norm(x, adapters), batch))
            return ops.add(x, self.feed_forward(self.final_layer_norm(x, adapters), adapters))
        x = self.self_attn_layer_norm(ops.add(x, self.self_attn(x, batch)), adapters)
        return self.final_layer_norm(ops.add(x, self.feed_forward(x, adapters)), adapters)


class OPTDecoder(nn.Module):
    """Tokens [T] -> rows as wide as the embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        narrow, width = config.raw.get("word_embed_proj_dim") or config.hidden_size, config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, narrow)
        self.embed_positions = Embedding(config.max_position_embeddings + POSITION_OFFSET, width)
        self.project_in = Linear(narrow, width) if narrow != width else None
        self.project_out = Linear(width, narrow) if narrow != width else None
        self.layers = nn.ModuleList(OPTLayer(config, index) for index in range(config.num_layers))
        # `_remove_final_layer_norm` marks checkpoints from before transformers 4.20.1 that were trained without it.
        last = config.raw.get("do_layer_norm_before", True) and not config.raw.get("_remove_final_layer_norm", False)
        self.final_layer_norm = _norm(config) if last else None

    def begin(self, batch: Batch) -> tuple[Tensor, list[LayerStep]]:
        x = self.embed_tokens(batch.tokens, batch.adapters)
        if self.project_in is not None:
            x = self.project_in(x, batch.adapters)
        x = x + self.embed_positions(batch.positions + POSITION_OFFSET, batch.adapters)
        return x, [layer_step(layer, batch) for layer in self.layers]

    def finish(self, x: Tensor, batch: Batch) -> Tensor:
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x, batch.adapters)
        return x if self.project_out is None else self.project_out(x, batch.adapters)

    def forward(self, batch: Batch) -> Tensor:
        return run(self, batch)


class OPTModel(nn.Module):
    """The checkpoint's shell around the decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.decoder = OPTDecoder(config)

    def forward(self, batch: Batch) -> Tensor:
        return self.decoder(batch)


class Model(CausalLM):
    """The causal model over it."""

    decoder = OPTModel

    @property
    def body(self) -> nn.Module:
        return self.model.decoder

    @property
    def table(self) -> Embedding:
        return self.model.decoder.embed_tokens

    @classmethod
    def checkpoint_names(cls, name: str) -> Iterable[str]:
        # A number that fairseq left in some of the published files.
        return () if name.endswith("decoder.version") else super().checkpoint_names(name)
