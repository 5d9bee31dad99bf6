"""The workloads are what the harness that made the first table gave its engines, id by id."""

from __future__ import annotations

import hashlib
import json

import pytest

from benchmarks.engines.workloads import WORKLOADS, check_prompt, decode_rate

# Of the prompts of run 3, from that harness.
DIGESTS = {
    "W1": "7129f35098f51637",
    "W2": "a3c61c02fac5fb73",
    "W3": "2840d15aed2ce3c6",
    "W4": "dcfd2cdbc70981ba",
    "W5": "aa3271462fe0cfa8",
    "W6": "98aa1b361434aefa",
}
COUNTS = {"W1": (1, 128, 128), "W2": (1, 2048, 1), "W3": (32, 256, 128), "W4": (32, 1056, 32)}
COUNTS |= {"W5": COUNTS["W3"], "W6": COUNTS["W3"]}


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_are_those_of_the_harness(name: str) -> None:
    workload = WORKLOADS[name]
    prompts = workload.prompts(3)
    assert hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16] == DIGESTS[name]
    assert (len(prompts), len(prompts[0]), workload.output) == COUNTS[name]
    assert prompts != workload.prompts(4)
    assert check_prompt()[:4] == [29801, 27375, 20952, 15321]


def test_only_w4_shares_a_prefix() -> None:
    shared = WORKLOADS["W4"].prompts(0)
    assert len({tuple(prompt[:1024]) for prompt in shared}) == 1
    assert len({tuple(prompt[1024:]) for prompt in shared}) == 32
    assert WORKLOADS["W4"].computed_prompt() == 1024 + 32 * 32
    apart = WORKLOADS["W3"].prompts(0)
    assert len({prompt[0] for prompt in apart}) > 30


def test_adapters_go_round() -> None:
    assert WORKLOADS["W5"].adapter_numbers() == [number % 8 for number in range(32)]
    assert WORKLOADS["W3"].adapter_numbers() is None


def test_what_rates_count() -> None:
    assert WORKLOADS["W2"].tokens() == 2048
    assert WORKLOADS["W3"].tokens() == 32 * 128
    assert decode_rate(128, 3.0, 0.46) == pytest.approx(127 / 2.54)
