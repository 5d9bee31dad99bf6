"""Text in, tokens out, and back: tokenizer, chat templates, and the text of a sequence while it grows.

The room knows token ids, strings and bytes. It knows no model, no engine, no HTTP and no torch.
"""

from quire.text.stream import TextStream
from quire.text.tokenizer import Tokenizer

__all__ = ["TextStream", "Tokenizer"]
