"""What the application will take on at once. Plain numbers; the server's options fill them in."""

from __future__ import annotations

from dataclasses import dataclass

from quire.request import MAX_SAMPLES


@dataclass(frozen=True)
class Limits:
    """Bounds of the whole application; None is no bound."""

    max_num_queued_reqs: int | None = 1024
    """Samples (n x prompts) waiting and running together."""
    max_num_queued_tokens: int | None = 1 << 20
    """Prompt tokens that are not computed yet. One request alone is always let in."""
    max_requests_per_key: int | None = None
    """Requests of one API key at the same time."""
    max_samples: int = MAX_SAMPLES
    """n x prompts of one request."""
    stall_seconds: float = 60.0
    """A running batch whose step counter stands still for so long means a stall."""
