"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, one product for q, k and v, matrices stored as [I, O]."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from quire import ops
from quire.batch import Batch
from quire.layers.attention import attend
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.norm import LayerNorm
from quire.models.config import ModelConfig
from quire.models.decoder import CausalLM, LayerStep, layer_step, run

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


class GPT2Attention(nn.Module):
    """Multi-head attention without rotation."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.layer, self.head_dim = index, config.head_dim
        self.c_attn = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.c_proj = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.scale = config.head_dim**-0.5 if config.raw.get("scale_attn_weights", True) else 1.0
        if config.raw.get("scale_attn_by_inverse_layer_idx", False):
            self.scale /= index + 1

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.c_attn(x, batch.adapters).unflatten(1, (3, -1, self.head_dim)).unbind(1)
        return self.c_proj(attend(q, k, v, batch, self.layer, scale=self.scale).flatten(1), batch.adapters)


class GPT2MLP(nn.Module):
    """Widen, bend, narrow."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size, bias=True)
        self.activation = config.activation

    def forward(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        return self.c_proj(ops.activation(self.c_fc(x, adapters), self.activation), adapters)


class GPT2Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = GPT2Attention(config, index)
        self.ln_2 = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = ops.add(x, self.attn(self.ln_1(x, batch.adapters), batch))
        return ops.add(x, self.mlp(self.ln_2(x, batch.adapters), batch.adapters))


class GPT2Decoder(nn.Module):
    """Tokens [T] -> hidden rows [T, E]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.wpe = Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(GPT2Block(config, index) for index in range(config.num_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps)

    def begin(self, batch: Batch) -> tuple[Tensor, list[LayerStep]]:
        x = ops.add(self.wte(batch.tokens, batch.adapters), self.wpe(batch.positions, batch.adapters))
        return x, [layer_step(block, batch) for block in self.h]

    def finish(self, x: Tensor, batch: Batch) -> Tensor:
        return self.ln_f(x, batch.adapters)

    def forward(self, batch: Batch) -> Tensor:
        return run(self, batch)


class Model(CausalLM):
    """The causal model over it."""

    decoder = GPT2Decoder
    prefix = "transformer"

    @property
    def table(self) -> Embedding:
        return self.transformer.wte

    @classmethod
    def checkpoint_names(cls, name: str) -> Iterable[str]:
        # The causal mask, which older files hold as a buffer.
        return () if name.endswith(".attn.bias") else super().checkpoint_names(name)

    @classmethod
    def convert(cls, name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if name.endswith(TRANSPOSED) else tensor
