"""How many tokens a second does Quire draw for many concurrent requests, beside transformers' batched generate?

A random model in the shape of Qwen2.5-0.5B, bfloat16, greedy, every request of the same length (the best case for padding-free
and padded batches alike). The contestants take turns within one run; between rounds the machine's read bandwidth and matrix
rate are measured, and with them the least time that this work could take: weights and cache read once a step, or the
arithmetic, whichever is longer.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks import physical, random_model
from benchmarks.contestants import NAMES, Answer, Peer
from benchmarks.random_model import Shape
from benchmarks.record import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=32, help="concurrent requests")
    parser.add_argument("--input", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens drawn for each")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each contestant, after one that is not counted")
    parser.add_argument("--layers", type=int, default=Shape.layers, help="fewer layers for a quick look")
    parser.add_argument("--vocabulary", type=int, default=Shape.vocabulary)


def run(options: argparse.Namespace) -> Outcome:
    shape = Shape(layers=options.layers, vocabulary=options.vocabulary)
    with tempfile.TemporaryDirectory() as name:
        random_model.write(Path(name), shape)
        answers, profile, limits = _rounds(name, options)
    # A machine's best moment is its limit; what else runs beside can only lower a measurement.
    bandwidth, rate = max(pair[0] for pair in limits), max(pair[1] for pair in limits)
    least = least_seconds(shape, options.prompts, options.input, options.output, bandwidth, rate)
    tokens = options.prompts * options.output
    numbers = {
        "read_bandwidth_gb_s": [round(pair[0] / 1e9, 2) for pair in limits],
        "bf16_multiply_gflop_s": [round(pair[1] / 1e9, 1) for pair in limits],
        # Processors without bfloat16 units multiply float32 faster: what a kernel could win by converting first.
        "float32_multiply_gflop_s": round(physical.multiply_rate(torch.float32) / 1e9, 1),
        "least_seconds": round(least, 3),
        "agreeing_outputs": sum(
            ours == theirs for ours, theirs in zip(answers["quire"][0].tokens, answers["transformers"][0].tokens, strict=True)
        ),
        "quire_seconds_by_part": {part: round(seconds, 3) for part, seconds in profile.items()},
    }
    for peer, given in answers.items():
        seconds = statistics.median(answer.seconds for answer in given)
        numbers[peer] = {
            "seconds": [round(answer.seconds, 3) for answer in given],
            "tokens_per_second": round(tokens / seconds, 1),
            "fraction_of_limit": round(least / seconds, 3),
            "peak_rss_mb": round(given[-1].peak_rss_bytes / 1e6),
        }
    return Outcome(_headline(options, numbers), numbers)


def least_seconds(shape: Shape, prompts: int, given: int, drawn: int, bandwidth: float, rate: float) -> float:
    """The time that the machine's limits allow: all prompts in one step, then a step for each further token."""
    weights = 2 * (shape.layer_weights + shape.head_weights)
    rows = prompts * given
    # The first step reads the head's table as well; it is bound by arithmetic in any case.
    total = max(weights / bandwidth, shape.work(rows, prompts, prompts * given * (given + 1) // 2) / rate)
    for length in range(given + 1, given + drawn):
        read = weights + prompts * length * shape.kv_bytes
        total += max(read / bandwidth, shape.work(prompts, prompts, prompts * length) / rate)
    return total


def _rounds(
    folder: str, options: argparse.Namespace
) -> tuple[dict[str, list[Answer]], dict[str, float], list[tuple[float, float]]]:
    """(answers by contestant, Quire's time by part, (bandwidth, rate) of every pause)."""
    draw = random.Random(0)
    prompts = [[draw.randrange(options.vocabulary) for _ in range(options.input)] for _ in range(options.prompts)]
    started = {"sequences": options.prompts, "length": options.input + options.output}
    peers = {name: Peer(name, folder, started) for name in NAMES}
    answers: dict[str, list[Answer]] = {name: [] for name in NAMES}
    limits = []
    try:
        for peer in peers.values():
            peer.generate(prompts, min(4, options.output))
        for _ in range(options.rounds):
            limits.append((physical.read_bandwidth(), physical.multiply_rate(torch.bfloat16)))
            for name, peer in peers.items():
                answers[name].append(peer.generate(prompts, options.output))
        profile = peers["quire"].generate(prompts, options.output, profile=True).profile
    finally:
        for peer in peers.values():
            peer.close()
    return answers, profile, limits


def _headline(options: argparse.Namespace, numbers: dict) -> str:
    ours, theirs = numbers["quire"], numbers["transformers"]
    parts = numbers["quire_seconds_by_part"]
    whole = sum(parts.values())
    largest = sorted(parts, key=parts.get, reverse=True)[:3]
    shares = ", ".join(f"{part} {100 * parts[part] / whole:.0f} %" for part in largest)
    return (
        f"{options.prompts} x {options.input} -> {options.output} tokens: Quire {ours['tokens_per_second']} tokens/s "
        f"({100 * ours['fraction_of_limit']:.0f} % of the machine's limit, {ours['peak_rss_mb']} MB), transformers "
        f"{theirs['tokens_per_second']} ({100 * theirs['fraction_of_limit']:.0f} %, {theirs['peak_rss_mb']} MB); "
        f"of Quire's time: {shares}"
    )
