"""What does serving many LoRA adapters cost, beside the base alone on the same engine?

A random model in the shape of Qwen2.5-0.5B, bfloat16, greedy, in this process. Requests of one batch go through the base, then
each through one of eight adapters of rank 16: on q and v, and on all linear layers. The three take turns within one run. Then
many adapters are registered and requests name them after Zipf's law, more of them than slots or memory hold: what is read
from the disk while others run counts, and so does any request that fails. Beside the time that passed, the processor's time is
told, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import random_model
from benchmarks.random_model import Shape
from benchmarks.record import Outcome

MIXED = 8
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {"q/v": random_model.ADAPTER_TARGETS, "all-linear": LINEAR}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(random_model.SHAPES), default="0.5b")
    parser.add_argument("--prompts", type=int, default=32, help="concurrent requests")
    parser.add_argument("--input", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens drawn for each")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each kind, after one that is not counted")
    parser.add_argument("--registered", type=int, default=500, help="adapters for the second part; 0 leaves it out")
    parser.add_argument("--requests", type=int, default=256, help="requests of the second part")
    parser.add_argument("--memory", type=int, default=64, help="adapters that memory holds in the second part")


def run(options: argparse.Namespace) -> Outcome:
    shape = random_model.SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        random_model.write(place / "base", shape)
        numbers: dict[str, Any] = {"mixed": mixed(place, shape, options)}
        if options.registered:
            numbers["registered"] = registered(place, shape, options)
    return Outcome(_headline(numbers, options), numbers)


def mixed(place: Path, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second through the base and through eight adapters of each kind, in turns."""
    llm = _engine(place, options, max_loras=MIXED, max_cpu_loras=MIXED * len(KINDS))
    for kind, targets in KINDS.items():
        for number in range(MIXED):
            folder = place / f"{targets[-1]}{number}"
            random_model.write_adapter(folder, shape, number, targets)
            llm.add_adapter(f"{kind} {number}", folder)
    names = {"base": [None], **{kind: [f"{kind} {number}" for number in range(MIXED)] for kind in KINDS}}
    prompts = _prompts(shape, options.prompts, options.input)
    seconds: dict[str, list[float]] = {kind: [] for kind in names}
    spent: dict[str, list[float]] = {kind: [] for kind in names}
    for count in range(options.rounds + 1):
        for kind, listed in names.items():
            chosen = [listed[place % len(listed)] for place in range(len(prompts))]
            took, processor, failed = _generate(llm, prompts, chosen, options.output)
            assert not failed
            if count:
                seconds[kind].append(took)
                spent[kind].append(processor)
    tokens, base = options.prompts * options.output, statistics.median(seconds["base"])
    return {
        kind: {
            "seconds": [round(one, 3) for one in taken],
            "tokens_per_second": round(tokens / statistics.median(taken), 1),
            "share_of_base": round(base / statistics.median(taken), 3),
            "share_of_base_by_processor_time": round(min(spent["base"]) / min(spent[kind]), 3),
        }
        for kind, taken in seconds.items()
    }


def registered(place: Path, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Many names, few places: requests after Zipf's law."""
    llm = _engine(place, options, max_loras=MIXED, max_cpu_loras=options.memory)
    began = time.perf_counter()
    for number in range(options.registered):
        folder = place / f"many{number}"
        random_model.write_adapter(folder, shape, number, random_model.ADAPTER_TARGETS)
        llm.add_adapter(f"many{number}", folder)
    registering = time.perf_counter() - began
    weights = [1 / (rank + 1) for rank in range(options.registered)]
    chosen = [f"many{number}" for number in random.Random(0).choices(range(options.registered), weights, k=options.requests)]
    prompts = _prompts(shape, options.requests, options.input)
    base, base_processor, _ = _generate(llm, prompts, [None] * options.requests, options.output)
    took, processor, failed = _generate(llm, prompts, chosen, options.output)
    tokens = options.requests * options.output
    return {
        "adapters": options.registered,
        "named_by_requests": len(set(chosen)),
        "in_memory": llm.adapters.num_in_memory,
        "seconds_to_write_and_register": round(registering, 1),
        "failed_requests": failed,
        "tokens_per_second": round(tokens / took, 1),
        "base_tokens_per_second": round(tokens / base, 1),
        "share_of_base": round(base / took, 3),
        "share_of_base_by_processor_time": round(base_processor / processor, 3),
    }


def _engine(place: Path, options: argparse.Namespace, **more: Any) -> Any:
    from quire import LLM

    length = options.input + options.output
    return LLM(
        str(place / "base"),
        max_model_len=length,
        max_num_seqs=options.prompts,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        enable_lora=True,
        **more,
    )


def _generate(llm: Any, prompts: list[list[int]], names: list[str | None], tokens: int) -> tuple[float, float, int]:
    """(seconds, seconds of the processor, how many requests did not draw all their tokens)."""
    from quire import LoRARequest, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    requests = [None if name is None else LoRARequest(name) for name in names]
    began, spent = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
    took, spent = time.perf_counter() - began, time.process_time() - spent
    return took, spent, sum(len(output.outputs[0].token_ids) != tokens for output in outputs)


def _prompts(shape: Shape, count: int, length: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(shape.vocabulary) for _ in range(length)] for _ in range(count)]


def _headline(numbers: dict[str, Any], options: argparse.Namespace) -> str:
    parts = numbers["mixed"]
    line = (
        f"{options.prompts} x {options.input} -> {options.output} tokens on {options.shape}, {MIXED} adapters of rank "
        f"{random_model.ADAPTER_RANK} mixed: base {parts['base']['tokens_per_second']} tokens/s, "
        + ", ".join(f"{kind} {100 * parts[kind]['share_of_base']:.0f} % of it" for kind in KINDS)
    )
    many = numbers.get("registered")
    if many:
        line += (
            f"; {many['adapters']} registered, {many['named_by_requests']} named by {options.requests} requests: "
            f"{100 * many['share_of_base']:.0f} %, {many['failed_requests']} failed"
        )
    return line
