"""Keys of KV blocks: a chain of digests, so that a key names all that came before.

The chain begins with what the keys and values depend on beside tokens: the model, the adapter's content and the caller's
cache salt.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 32


def root_key(model_digest: str, adapter_digest: str = "", cache_salt: str = "") -> bytes:
    """The chain's beginning."""
    parts = (model_digest, adapter_digest, cache_salt)
    return hashlib.blake2b(b"\0".join(hashlib.sha256(part.encode()).digest() for part in parts), digest_size=KEY_BYTES).digest()


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block that holds `tokens` after everything that `parent` names."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=KEY_BYTES).digest()
