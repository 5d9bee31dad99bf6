"""What the scheduler obeys. Wishes become limits in the plan; the active ones may change while the engine runs."""

from __future__ import annotations

from dataclasses import dataclass

from quire.speculation import Speculation


@dataclass
class Limits:
    """Active limits; all but the block size and the speculation may be changed between steps."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int = 16
    long_prefill_token_threshold: int = 0
    policy: str = "fcfs"
    prefix_caching: bool = True
    speculation: Speculation | None = None
    max_loras: int = 0
    """Different adapters in one step."""
    enough_tokens: int = 0
    """A step of so many tokens lets no further prompt in, which would delay the first tokens of those before. 0: any may."""
