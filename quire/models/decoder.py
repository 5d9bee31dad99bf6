"""The shared decoder: embedding, layers, final norm, head. A family's file overrides only what it does differently.

Module names are the checkpoint's own, so that loading is a look-up. Nothing here knows quantization, LoRA, parallel ranks,
requests or how a cache is managed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from quire import ops
from quire.batch import Batch
from quire.layers.attention import Attention, Rotation
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.mlp import GatedMLP
from quire.layers.norm import RMSNorm
from quire.layers.rope import Rope
from quire.layers.rope_config import RopeConfig
from quire.models.config import ModelConfig

LayerStep = Callable[[Tensor], Tensor]


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = self.norm(config, config.hidden_size)
        self.self_attn = self.attention(config, index)
        self.post_attention_layernorm = self.norm(config, config.hidden_size)
        self.mlp = self.feed_forward(config, index)

    def norm(self, config: ModelConfig, size: int) -> nn.Module:
        return RMSNorm(size, config.norm_eps)

    def attention(self, config: ModelConfig, index: int, *, bias: bool | None = None) -> Attention:
        """bias: of q, k, v; None: of all four as the configuration's `attention_bias` says."""
        everywhere = bool(config.raw.get("attention_bias", False))
        bias = everywhere if bias is None else bias
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        return Attention(
            index,
            heads,
            kv_heads,
            size,
            q_proj=Linear(config.hidden_size, heads * size, bias),
            k_proj=Linear(config.hidden_size, kv_heads * size, bias),
            v_proj=Linear(config.hidden_size, kv_heads * size, bias),
            o_proj=Linear(heads * size, config.hidden_size, everywhere),
            window=config.layer_windows[index],
        )

    def feed_forward(self, config: ModelConfig, index: int) -> nn.Module:
        del index  # for families whose layers differ
        bias = bool(config.raw.get("mlp_bias", False))
        return GatedMLP(config.hidden_size, config.intermediate_size, config.activation, bias)

    def forward(self, x: Tensor, rotation: Rotation | None, batch: Batch) -> Tensor:
        x = ops.add(x, self.self_attn(self.input_layernorm(x, batch.adapters), rotation, batch))
        return ops.add(x, self.mlp(self.post_attention_layernorm(x, batch.adapters), batch.adapters))


def layer_step(layer: nn.Module, *context: object) -> LayerStep:
    """What `layer` makes of rows x, the rest of its arguments being given."""
    return lambda x: layer(x, *context)


def run(decoder: nn.Module, batch: Batch) -> Tensor:
    """The whole forward pass of a decoder with `begin` and `finish`."""
    x, layers = decoder.begin(batch)
    for layer in layers:
        x = layer(x)
    return decoder.finish(x, batch)


class Decoder(nn.Module):
    """Tokens [T] -> hidden rows [T, E].

    All decoders have `begin(batch)`, the embedded rows and what each layer makes of rows, in order, and `finish(x, batch)`,
    what comes after the last layer. `forward` is the one after the other; training goes layer by layer, there and back.
    """

    layer: type[DecoderLayer] = DecoderLayer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer(config, index) for index in range(config.num_layers))
        self.norm = self.layers[0].norm(config, config.hidden_size)
        self.ropes = {rope: None for rope in config.layer_ropes if rope is not None}

    def embed(self, batch: Batch) -> Tensor:
        return self.embed_tokens(batch.tokens, batch.adapters)

    def rotations(self, batch: Batch) -> dict[RopeConfig, Rotation]:
        """The angles of this batch's positions, once for all layers that share them."""
        longest = max(batch.lengths)
        rotations = {}
        for rope, rotary in self._rotaries().items():
            rotary.reach(longest)
            rotations[rope] = rotary(batch.positions)
        return rotations

    def _rotaries(self) -> dict[RopeConfig, Rope]:
        # Built on first use: a tree on the meta device has no tensors to compute with.
        for rope, rotary in self.ropes.items():
            if rotary is None:
                self.ropes[rope] = Rope(rope)
        return self.ropes

    def begin(self, batch: Batch) -> tuple[Tensor, list[LayerStep]]:
        rotations = self.rotations(batch)
        ropes = zip(self.layers, self.config.layer_ropes, strict=True)
        return self.embed(batch), [layer_step(layer, rotations.get(rope), batch) for layer, rope in ropes]

    def finish(self, x: Tensor, batch: Batch) -> Tensor:
        return self.norm(x, batch.adapters)

    def forward(self, batch: Batch) -> Tensor:
        return run(self, batch)


class CausalLM(nn.Module):
    """A decoder with its head. `model(batch)` gives hidden rows, `model.logits(rows)` float32 logits [R, V]."""

    decoder: type[nn.Module] = Decoder
    # The decoder's name here and in checkpoints; files saved from the bare decoder leave it out.
    prefix = "model"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.add_module(self.prefix, self.decoder(config))
        self.lm_head = Linear(self.table.weight.shape[1], config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.table.weight

    @property
    def table(self) -> Embedding:
        """The token embedding that a tied head shares."""
        return self.model.embed_tokens

    @property
    def body(self) -> nn.Module:
        """The decoder under its checkpoint's shell: it has `begin` and `finish`."""
        return self.get_submodule(self.prefix)

    @property
    def written_prefix(self) -> str:
        """The decoder's path in the model that transformers makes of this configuration, by which adapters are named."""
        return self.prefix

    def forward(self, batch: Batch) -> Tensor:
        """Hidden rows [T, E], or [R, E] where the batch names the rows whose logits are wanted."""
        hidden = self.get_submodule(self.prefix)(batch)
        return hidden if batch.logit_rows is None else hidden[batch.logit_rows]

    def logits(self, hidden: Tensor, adapters: Tensor | None = None) -> Tensor:
        """hidden: rows [R, E] that `forward` gave. adapters: as in `Batch`, of these rows."""
        return self.lm_head(hidden, adapters).float()

    @classmethod
    def checkpoint_names(cls, name: str) -> Iterable[str]:
        """The parameter names that a tensor called `name` in a file may mean, likeliest first; none: not a parameter."""
        if name.endswith(("rotary_emb.inv_freq", ".masked_bias")):
            return ()
        return (name, f"{cls.prefix}.{name}")

    @classmethod
    def convert(cls, name: str, tensor: Tensor) -> Tensor:
        """A file's tensor in this definition's layout (GPT-2 stores its matrices transposed)."""
        del name
        return tensor


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), or the logits as they are (Gemma 2)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
