"""Llama 2 and 3, and Mistral, which differs by its configuration only (sliding window)."""

from quire.models.decoder import CausalLM


class Model(CausalLM):
    """The shared decoder as it is."""
