"""Who may come in: one slot is taken the moment a request arrives, before its body is read, and given back at its end.

Counting before any work is what keeps a burst from being read and tokenized only to be refused. Everything here runs on the
event loop's thread without awaiting, so check and reservation are one act. Knows no HTTP and no engine; the clock is injected.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable

from quire.errors import InvalidRequest, Overloaded, TooManyRequests
from quire.service.limits import Limits

RETRY_LOW, RETRY_HIGH = 1.0, 60.0
RATE_SECONDS = 20.0


class Rate:
    """Units a second, remembering about the last RATE_SECONDS of busy time: an idle hour must not look like a slow one."""

    def __init__(self) -> None:
        self._amount = self._window = 0.0

    def add(self, amount: float) -> None:
        self._amount += amount

    def passed(self, seconds: float) -> None:
        """So much busy time has gone by."""
        kept = math.exp(-seconds / RATE_SECONDS)
        self._amount *= kept
        self._window = self._window * kept + RATE_SECONDS * (1 - kept)

    def seconds_for(self, backlog: float) -> float:
        """How long `backlog` units take; if none was ever done, as long again as the busy time so far."""
        return backlog * self._window / self._amount if self._amount > 0 else self._window


class Admission:
    """The slots, the token backlog and each key's share."""

    def __init__(
        self,
        limits: Limits,
        on_reject: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.samples = 0
        self.backlog_tokens = 0
        self._of_key: Counter[str] = Counter()
        self._on_reject = on_reject
        self._sample_rate, self._token_rate = Rate(), Rate()
        self._clock, self._seen = clock, clock()

    def arrive(self, key: str = "") -> Ticket:
        """Take one slot for a request of `key`, or raise TooManyRequests or Overloaded."""
        most = self.limits.max_requests_per_key
        if most is not None and self._of_key[key] >= most:
            self._on_reject("key_concurrency")
            raise TooManyRequests(f"this API key has {most} requests in progress, which is its limit.", retry_after=RETRY_LOW)
        self._check_samples(1)
        self._pass_time()
        self.samples += 1
        self._of_key[key] += 1
        return Ticket(self, key)

    def _check_samples(self, more: int) -> None:
        most = self.limits.max_num_queued_reqs
        if most is not None and self.samples + more > most:
            self._on_reject("queued_requests")
            wait = self._wait(self.samples, self._sample_rate)
            raise Overloaded(f"the server is full: {self.samples} of {most} requests are queued.", retry_after=wait)

    def _check_tokens(self, more: int) -> None:
        most = self.limits.max_num_queued_tokens
        # An empty house takes any one request: otherwise a prompt above the limit would be told to try again for ever.
        if most is not None and self.backlog_tokens and self.backlog_tokens + more > most:
            self._on_reject("queued_tokens")
            wait = self._wait(self.backlog_tokens, self._token_rate)
            raise Overloaded(
                f"the server is full: {self.backlog_tokens} prompt tokens of at most {most} are queued.",
                retry_after=wait,
            )

    def _wait(self, backlog: float, rate: Rate) -> float:
        """Seconds until the backlog is worked off, clamped, with a little jitter so that clients do not return together."""
        self._pass_time()
        return min(RETRY_HIGH, max(RETRY_LOW, rate.seconds_for(backlog)) + random.random())

    def _pass_time(self) -> None:
        """Tell the rates how much busy time has gone by; called before `samples` leaves or reaches zero."""
        now = self._clock()
        if self.samples:
            self._sample_rate.passed(now - self._seen)
            self._token_rate.passed(now - self._seen)
        self._seen = now


class Ticket:
    """One admitted request's share of the limits. `release` is idempotent and belongs into a `finally`."""

    def __init__(self, admission: Admission, key: str) -> None:
        self._admission = admission
        self._key = key
        self._samples = 1
        self._tokens = 0
        self._released = False

    def extend(self, *, samples: int, tokens: int) -> None:
        """Now that the request is known: `samples` in all and `tokens` of prompts. Raises as `arrive` does."""
        house = self._admission
        most = house.limits.max_num_queued_reqs
        if most is not None and samples > most:
            raise InvalidRequest(f"n x prompts must be at most {most} on this server, got {samples}.", parameter="n")
        house._check_samples(samples - self._samples)
        house._check_tokens(tokens - self._tokens)
        house.samples += samples - self._samples
        house.backlog_tokens += tokens - self._tokens
        self._samples, self._tokens = samples, tokens

    def computed(self, tokens: int) -> None:
        """`tokens` of this request's prompts have been computed and are no longer backlog."""
        tokens = min(tokens, self._tokens)
        self._tokens -= tokens
        self._admission.backlog_tokens -= tokens
        self._admission._token_rate.add(tokens)

    def release(self) -> None:
        """Give everything back."""
        if self._released:
            return
        self._released = True
        house = self._admission
        house._pass_time()
        house.samples -= self._samples
        house.backlog_tokens -= self._tokens
        house._sample_rate.add(self._samples)
        house._of_key[self._key] -= 1
        if not house._of_key[self._key]:
            del house._of_key[self._key]
