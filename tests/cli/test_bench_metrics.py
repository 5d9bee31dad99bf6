"""Metrics on times made by hand; arrivals whose mean rate and spread are what was asked for."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire.cli.bench_data import HIGHEST_ID, LOWEST_ID, file_requests, random_requests
from quire.cli.bench_metrics import (
    Timed,
    arrival_times,
    percentile,
    read_metrics,
    read_percentiles,
    read_promises,
    summary,
)
from quire.errors import ConfigError

# Sent at 10 s; first token after 0.5 s, then gaps of 0.1, 0.3 and 0.2 s; five tokens, as one event held two.
SLOW = Timed(10.0, (10.5, 10.6, 10.9, 11.1), 7, 5)
# One token only.
SHORT = Timed(10.2, (10.3,), 3, 1)
QUICK = Timed(10.4, (10.5, 10.55), 3, 2)


def numbers(answered: list[Timed], **changes: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"promises": {}, "metrics": ["ttft", "tpot", "itl", "e2el"], "percentiles": [50, 99]}
    return summary(answered, 1, 2.0, **{**asked, **changes})


def test_times_of_one_request() -> None:
    assert pytest.approx(0.5) == SLOW.ttft
    assert pytest.approx(1.1) == SLOW.e2el
    assert pytest.approx(0.6 / 4) == SLOW.tpot
    assert SLOW.itl == pytest.approx([0.1, 0.3, 0.2])
    assert (SHORT.tpot, SHORT.itl) == (None, [])


def test_rates_and_means() -> None:
    found = numbers([SLOW, SHORT, QUICK])
    assert (found["completed"], found["failed"], found["duration"]) == (3, 1, 2.0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (13, 8)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (1.5, 4.0, 10.5)
    assert found["mean_ttft_ms"] == pytest.approx(1e3 * (0.5 + 0.1 + 0.1) / 3)
    assert found["median_ttft_ms"] == pytest.approx(100)
    assert found["mean_tpot_ms"] == pytest.approx((150 + 50) / 2)  # a request of one token has none
    assert found["mean_itl_ms"] == pytest.approx((100 + 300 + 200 + 50) / 4)
    assert found["p99_itl_ms"] == pytest.approx(297)
    assert found["median_e2el_ms"] == found["p50_e2el_ms"] == pytest.approx(150)
    assert found["std_ttft_ms"] == pytest.approx(statistics.pstdev([500, 100, 100]))
    assert found["max_concurrent_requests"] == 2  # the short one ended before the quick one began
    assert found["max_output_tokens_per_s"] == 6  # of seven events, one comes later than a second
    assert found["request_goodput"] is None


@pytest.mark.parametrize(
    "promises, good",
    [
        ({"ttft": 200}, 2),
        ({"ttft": 500.1}, 3),
        ({"ttft": 200, "tpot": 40}, 1),
        ({"e2el": 160, "ttft": 99}, 0),
        ({"tpot": 0}, 1),
    ],
)
def test_goodput_counts_requests_that_keep_every_promise(promises: dict[str, float], good: int) -> None:
    assert numbers([SLOW, SHORT, QUICK], promises=promises)["request_goodput"] == pytest.approx(good / 2)


def test_only_the_metrics_asked_for() -> None:
    found = numbers([SLOW], metrics=["ttft"], percentiles=[99.9])
    assert "p99.9_ttft_ms" in found
    assert not [name for name in found if "itl" in name or "p99_" in name]


def test_one_token_answers_have_no_gaps() -> None:
    found = numbers([SHORT])
    assert (found["mean_itl_ms"], found["p99_tpot_ms"]) == (0.0, 0.0)


def test_percentiles_are_numpys() -> None:
    import numpy as np

    values = [random.Random(0).random() for _ in range(101)]
    for percent in (0, 1, 37.5, 50, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))
    assert percentile([], 50) == 0.0


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    count, rate = 20_000, 8.0
    times = list(arrival_times(count, rate, burstiness, random.Random(1)))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(count / rate)
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(1 / rate)
    # The deviation of a gamma distribution of shape k is its mean / sqrt(k).
    assert statistics.pstdev(gaps) == pytest.approx(1 / rate / math.sqrt(burstiness), rel=0.05)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert list(arrival_times(3, math.inf, 1.0, random.Random(0))) == [0.0, 0.0, 0.0]
    assert list(arrival_times(3, 2.0, 1.0, random.Random(7))) == list(arrival_times(3, 2.0, 1.0, random.Random(7)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: read_promises(["ttft"]), "--goodput ttft must be milliseconds"),
        (lambda: read_promises(["itl:3"]), "--goodput must name ttft, tpot, e2el"),
        (lambda: read_promises(["ttft:-1"]), "of at least 0"),
        (lambda: read_metrics("ttft,latency"), "got 'latency'"),
        (lambda: read_percentiles("50,101"), r"in \[0, 100\]"),
        (lambda: read_percentiles("half"), "got 'half'"),
        (lambda: random_requests(1, 1, 1, spread=1.0), r"--random-range-ratio must be in \[0, 1\)"),
    ],
)
def test_wrong_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
    assert read_promises(["ttft:200", "e2el:1e3"]) == {"ttft": 200.0, "e2el": 1000.0}


def test_random_requests() -> None:
    requests = random_requests(20, 30, 10, prefix=5, spread=0.2, seed=3)
    heads = {tuple(asked.prompt[:5]) for asked in requests}
    assert len(heads) == 1
    assert {len(asked.prompt) for asked in requests} <= set(range(29, 42))
    assert len({asked.output for asked in requests}) > 1
    assert all(LOWEST_ID <= token < HIGHEST_ID for asked in requests for token in asked.prompt)
    assert requests == random_requests(20, 30, 10, prefix=5, spread=0.2, seed=3)
    (words,) = random_requests(1, 30, 10, text=True)
    assert len(words.prompt.split()) == 30


def test_requests_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": [1, 2], "output_tokens": 3}\n')
    requests = file_requests(path, 5, 9)
    assert len(requests) == 5
    assert {(str(asked.prompt), asked.output) for asked in requests} == {("one", 9), ("[1, 2]", 3)}
    wrong = {"{}": "line 1: must be", '{"prompt": ""}': "not empty", '{"prompt": "x", "output_tokens": -1}': "at least 1"}
    for line, message in wrong.items():
        path.write_text(line)
        with pytest.raises(ConfigError, match=message):
            file_requests(path, 1, 1)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        file_requests(path, 1, 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        file_requests(tmp_path / "none", 1, 1)
