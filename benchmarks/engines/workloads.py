"""The six workloads. Prompts are token ids that a rule gives for workload, run and request: every engine reads the same ones.

Greedy, and an end-of-sequence token ends nothing. Prompts differ from run to run, so that a prefix cache helps only where
requests of one run share a prefix. Knows no engine and only the standard library.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# The ids that the merges of the benchmark's tokenizer cover.
IDS = range(300, 30_000)
ADAPTERS = 8
# W1 subtracts the time of a prompt and its first token, which is measured with other prompts.
FIRST_TOKEN_RUNS = 1000


@dataclass(frozen=True)
class Workload:
    """shared: tokens at the front of every prompt that all requests of a run have in common; prompt: the tokens after them."""

    name: str
    title: str
    unit: str
    count: int
    prompt: int
    output: int
    shared: int = 0
    adapters: bool = False
    server: bool = False

    def prompts(self, run: int, ids: range = IDS) -> list[list[int]]:
        """The prompts of one run."""
        seed = f"{self.name}/{run}/"
        if self.count == 1:
            return [_draw(self.prompt, seed, ids)]
        head = _draw(self.shared, seed + "head", ids) if self.shared else []
        return [head + _draw(self.prompt, seed + str(number), ids) for number in range(self.count)]

    def adapter_numbers(self) -> list[int] | None:
        """The adapter of each request, or None."""
        return [number % ADAPTERS for number in range(self.count)] if self.adapters else None

    def tokens(self) -> int:
        """What a rate counts: the prompt where that is the work, the output elsewhere."""
        return self.prompt if self.output == 1 else self.count * self.output

    def computed_prompt(self) -> int:
        """Prompt tokens that must be computed when a common prefix is computed once."""
        return self.shared + self.count * self.prompt


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "one stream, 128 in, 128 out", "decode tokens/s", 1, 128, 128),
        Workload("W2", "one prompt of 2,048 tokens", "prompt tokens/s", 1, 2048, 1),
        Workload("W3", "32 requests, 256 in, 128 out", "output tokens/s", 32, 256, 128),
        Workload("W4", "32 requests behind 1,024 common tokens, 32 out", "output tokens/s", 32, 32, 32, shared=1024),
        Workload("W5", "W3 over 8 adapters of rank 16", "output tokens/s", 32, 256, 128, adapters=True),
        Workload("W6", "W3 through the HTTP server, 32 streams", "output tokens/s", 32, 256, 128, server=True),
    )
}
# Greedy tokens of one prompt: do the engines compute the same model?
CHECK = Workload("CHECK", "24 greedy tokens", "tokens", 1, 64, 24)


def check_prompt(ids: range = IDS) -> list[int]:
    return _draw(CHECK.prompt, "check", ids)


def decode_rate(output: int, whole: float, first: float) -> float:
    """Tokens a second after the first one, of a run that took `whole` seconds, `first` of them up to its first token."""
    return (output - 1) / max(whole - first, 1e-9)


def _draw(count: int, seed: str, ids: range) -> list[int]:
    return random.Random(seed).sample(ids, count)
