"""Gemma 3, text (Gemma Team 2025): Gemma 2's layers with a norm on each head of q and k instead of soft caps.

Five layers of six look through a window and rotate by another base, which is data (`config.layer_windows`,
`config.layer_ropes`). Of image-and-text checkpoints (Gemma3ForConditionalGeneration) only the text part is read.
"""

from __future__ import annotations

from collections.abc import Iterable

from quire.layers.attention import Attention
from quire.models import gemma2
from quire.models.config import ModelConfig

IMAGE_PARTS = ("vision_tower.", "multi_modal_projector.")


class Gemma3Layer(gemma2.Gemma2Layer):
    """A layer whose attention owns q_norm and k_norm."""

    def attention(self, config: ModelConfig, index: int, *, bias: bool | None = None) -> Attention:
        attention = super().attention(config, index, bias=bias)
        attention.q_norm = self.norm(config, config.head_dim)
        attention.k_norm = self.norm(config, config.head_dim)
        return attention


class Gemma3Decoder(gemma2.Gemma2Decoder):
    """Layers of that kind."""

    layer = Gemma3Layer


class Model(gemma2.Model):
    """The causal model over it."""

    decoder = Gemma3Decoder

    @property
    def written_prefix(self) -> str:
        return "model.language_model" if self.config.architecture == "Gemma3ForConditionalGeneration" else self.prefix

    @classmethod
    def checkpoint_names(cls, name: str) -> Iterable[str]:
        """Image-and-text files say `language_model.model.layers...`, or `model.language_model.layers...` as written later."""
        name = name.replace("model.language_model.", "model.").removeprefix("language_model.")
        return () if name.removeprefix("model.").startswith(IMAGE_PARTS) else super().checkpoint_names(name)
