"""What the times of requests say, under vLLM's names. Arithmetic on numbers: knows no server and no clock.

TTFT: from sending to the first token. ITL: between two events that follow each other. TPOT: a request's time after its first
token, for each further token. E2EL: from sending to the last token. Goodput: requests a second that keep every promise.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.errors import ConfigError

TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
PROMISES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Timed:
    """One request that was answered. Times in seconds; arrivals: of each event with text, at least one."""

    began: float
    arrivals: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.began

    @property
    def e2el(self) -> float:
        return self.arrivals[-1] - self.began

    @property
    def tpot(self) -> float | None:
        """None where there is no further token."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.arrivals)]

    def keeps(self, promises: Mapping[str, float]) -> bool:
        """Whether no promised time (milliseconds) is exceeded."""
        times = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2el": self.e2el}
        return all(1e3 * times[name] <= most for name, most in promises.items())


def summary(
    answered: Sequence[Timed],
    failed: int,
    duration: float,
    *,
    promises: Mapping[str, float],
    metrics: Iterable[str],
    percentiles: Sequence[float],
) -> dict[str, Any]:
    """The numbers of one run, keys as vLLM writes them."""
    given = sum(timed.prompt_tokens for timed in answered)
    drawn = sum(timed.output_tokens for timed in answered)
    good = sum(timed.keeps(promises) for timed in answered)
    numbers: dict[str, Any] = {
        "duration": duration,
        "completed": len(answered),
        "failed": failed,
        "total_input_tokens": given,
        "total_output_tokens": drawn,
        "request_throughput": len(answered) / duration,
        "request_goodput": good / duration if promises else None,
        "output_throughput": drawn / duration,
        "total_token_throughput": (given + drawn) / duration,
        "max_output_tokens_per_s": _busiest_second(answered),
        "max_concurrent_requests": _most_at_once(answered),
    }
    values = {
        "ttft": [timed.ttft for timed in answered],
        "tpot": [timed.tpot for timed in answered if timed.tpot is not None],
        "itl": [gap for timed in answered for gap in timed.itl],
        "e2el": [timed.e2el for timed in answered],
    }
    for name in metrics:
        milliseconds = [1e3 * value for value in values[name]]
        numbers[f"mean_{name}_ms"] = statistics.fmean(milliseconds) if milliseconds else 0.0
        numbers[f"median_{name}_ms"] = percentile(milliseconds, 50)
        numbers[f"std_{name}_ms"] = statistics.pstdev(milliseconds) if milliseconds else 0.0
        for wanted in percentiles:
            numbers[f"p{wanted:g}_{name}_ms"] = percentile(milliseconds, wanted)
    return numbers


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values, as numpy does it; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def arrival_times(count: int, rate: float, burstiness: float, draw: random.Random) -> Iterator[float]:
    """Seconds after the start at which each request is sent.

    Gaps have a gamma distribution of shape `burstiness` and mean 1 / rate: 1 is a Poisson process, less comes in bursts, more
    is steadier. As vLLM does, the times are stretched so that the last one is count / rate. An infinite rate sends all at once.
    """
    if math.isinf(rate):
        yield from itertools.repeat(0.0, count)
        return
    gaps = [draw.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)]
    whole = sum(gaps)
    stretch = count / rate / whole if whole > 0 else 1.0
    yield from itertools.accumulate(gap * stretch for gap in gaps)


def read_promises(words: Iterable[str]) -> dict[str, float]:
    """`ttft:200 tpot:50` -> milliseconds by metric."""
    promises: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition(":")
        if name not in PROMISES:
            raise ConfigError(f"--goodput must name {', '.join(PROMISES)}, as in ttft:200, got {word!r}.")
        try:
            promises[name] = float(text)
        except ValueError:
            promises[name] = -1.0
        if not 0 <= promises[name] < math.inf:
            raise ConfigError(f"--goodput {name} must be milliseconds of at least 0, as in {name}:200, got {word!r}.")
    return promises


def read_percentiles(text: str) -> list[float]:
    """`50,99` -> numbers in [0, 100]."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= percent <= 100 for percent in found):
        raise ConfigError(f"--metric-percentiles must be numbers in [0, 100] with commas between them, got {text!r}.")
    return found


def read_metrics(text: str) -> list[str]:
    """`ttft,tpot` -> names."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    for name in names:
        if name not in TITLES:
            raise ConfigError(f"--percentile-metrics must be among {', '.join(TITLES)}, got {name!r}.")
    return names


def _busiest_second(answered: Sequence[Timed]) -> float:
    """Most output tokens within one second of the run's clock, an event counted as one token."""
    if not answered:
        return 0.0
    start = min(timed.began for timed in answered)
    seconds: dict[int, int] = {}
    for timed in answered:
        for arrival in timed.arrivals:
            second = int(arrival - start)
            seconds[second] = seconds.get(second, 0) + 1
    return float(max(seconds.values(), default=0))


def _most_at_once(answered: Sequence[Timed]) -> int:
    changes = [(timed.began, 1) for timed in answered] + [(timed.arrivals[-1], -1) for timed in answered]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most
